"""How close K plain LoRAs come to a masked generation: image error against K.

    python examples/train.py --output my-toy
    python benchmarks/bands.py my-toy

The adapter of the embedded base is exported in bands, which the pipeline then uses as a program
would that knows nothing of T-LoRA: plain LoRA files, one active at a time, chosen by the range of
timesteps in bands.json. The error is the root mean square difference of the pixels (0 to 1) to the
masked generation, over all pictures. For scale: without a mask, and without the adapter.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import peft_tlora
from peft_tlora.formats import read_adapter
from peft_tlora.formats.bands import write_bands
from peft_tlora.formats.lora import write_lora
from peft_tlora.formats.plain import plain_lora

MODEL = Path(__file__).parents[1] / "examples" / "toybox" / "model"
PROMPTS = [
    f"a photo of a sks toy on a {colour} {texture} background"
    for colour in ("green", "blue", "yellow")
    for texture in ("striped", "plain")
]
STEPS = 25


def pipeline():
    pipe = DiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, switch=None):
    """Pictures of all prompts; `switch` is called with the timestep before each step."""
    if switch is not None:
        switch(pipe, float(pipe.scheduler.timesteps[0]))

    def after(pipe, i, t, kwargs):
        if switch is not None and i + 1 < len(pipe.scheduler.timesteps):
            switch(pipe, float(pipe.scheduler.timesteps[i + 1]))
        return kwargs

    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    images = pipe(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        generator=generators,
        output_type="pt",
        callback_on_step_end=after,
    ).images
    return images.double()


def banded(adapter, count):
    pipe = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        write_bands(adapter, folder, count=count, to="lora")
        bands = json.loads((Path(folder) / "bands.json").read_text())["bands"]
        for band in bands:
            state_dict = load_file(Path(folder) / band["file"])
            pipe.load_lora_weights(state_dict, adapter_name=band["file"].partition(".")[0])

    def switch(pipe, t):
        band = next(b for b in bands if b["timestep"][1] < t or b is bands[-1])
        pipe.set_adapters(band["file"].partition(".")[0])

    pipe.scheduler.set_timesteps(STEPS)
    return generate(pipe, switch)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter")
    args = parser.parse_args()
    adapter = read_adapter(args.adapter)
    schedule = next(iter(adapter.layers.values())).schedule
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"diffusers {diffusers.__version__}, peft_tlora {peft_tlora.__version__}")
    print(f"{schedule}; {len(PROMPTS)} pictures of {STEPS} steps")
    pipe = pipeline()
    plain = generate(pipe)
    pipe.load_lora_weights(args.adapter)
    masked = generate(pipe)

    def report(name, images):
        print(f"{name:>12}: {(images - masked).square().mean().sqrt():.2e}", flush=True)

    report("no adapter", plain)
    pipe = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        pipe.load_lora_weights(str(write_lora(plain_lora(adapter), folder)))
    report("no mask", generate(pipe))
    for count in (1, 2, 4, schedule.r - schedule.r_min):
        report(f"K = {count}", banded(adapter, count))


if __name__ == "__main__":
    main()
