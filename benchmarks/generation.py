"""A denoising step of the embedded base: plain, with adapters, with adapters in the weights.

    python benchmarks/generation.py

One picture of 25 steps with guidance, all ranks of `r` = 16 from 8 on. `FusedGeneration` is enabled
once for all pictures; each begins with the noisiest mask, so that the weights are made anew.
"""

from collections.abc import Callable

import diffusers
import torch
from diffusers import DiffusionPipeline
from measure import interleaved, ratio, report
from peft import LoraConfig
from toybox.gate import MODEL

from peft_tlora import FusedGeneration, TLoraConfig, timestep_context

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
TARGETS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
STEPS, REPEATS = 25, 9
VARIANTS = {
    "base": (None, ""),
    "LoRA": (LoraConfig, ""),
    "LoRA, fuse_lora": (LoraConfig, "fuse"),
    "T-LoRA": (TLoraConfig, ""),
    "T-LoRA, FusedGeneration": (TLoraConfig, "mode"),
}


def pipeline(cls: type | None, fused: str = "", dtype: torch.dtype = torch.float32) -> object:
    """The embedded base with an adapter that changes something."""
    pipe = DiffusionPipeline.from_pretrained(str(MODEL), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if cls is not None:
        pipe.unet.add_adapter(cls(r=16, lora_alpha=16, target_modules=TARGETS))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (noise / 100).to(parameter.dtype)
    if fused == "fuse":
        pipe.fuse_lora()
    if fused == "mode":
        FusedGeneration(pipe.unet).enable()
    return pipe


def generate(pipe: object, steps: int = STEPS) -> torch.Tensor:
    """The latents of a picture."""
    return pipe(  # pyright: ignore[reportCallIssue]
        "a photo of a sks toy",
        num_inference_steps=steps,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@torch.no_grad()
def errors() -> str:
    """How far outputs are from float64's in bfloat16: at one mask, in the mode and merged."""
    exact = pipeline(TLoraConfig, dtype=torch.float64).unet  # pyright: ignore[reportAttributeAccessIssue]
    low = pipeline(TLoraConfig, dtype=torch.bfloat16).unet  # pyright: ignore[reportAttributeAccessIssue]
    exact.load_state_dict({name: t.double() for name, t in low.state_dict().items()}, strict=False)
    x = torch.randn(4, exact.config.in_channels, 8, 8).bfloat16()
    states = torch.randn(4, 4, exact.config.cross_attention_dim).bfloat16()
    t = torch.tensor(500)
    right = exact(x.double(), t, states.double()).sample

    def error() -> float:
        return float((low(x, t, states).sample.double() - right).norm() / right.norm())

    found = {"masked": error()}
    with FusedGeneration(low):
        found["FusedGeneration"] = error()
    with timestep_context(low, t):
        low.fuse_lora()
    found["fuse_lora"] = error()
    return ", ".join(f"{name} {value:.2e}" for name, value in found.items())


def main() -> None:
    diffusers.utils.logging.disable_progress_bar()
    pipes = {name: pipeline(*variant) for name, variant in VARIANTS.items()}

    def timed(pipe: object) -> Callable[[int], Callable[[], object]]:
        return lambda repeat: lambda: generate(pipe)

    times = interleaved({name: timed(pipe) for name, pipe in pipes.items()}, REPEATS)
    rows = []
    for name, seconds in times.items():
        step = sorted(seconds)[REPEATS // 2] / STEPS * 1e3
        rows.append([name, f"{step:.1f} ms", *(ratio(times, name, x)[1] for x in ("base", "LoRA"))])
    head = ["", "a step", "/ base's", "/ LoRA's"]
    title = "A denoising step of the embedded base, float32, batch of 2 (guidance)"
    notes = f"Relative error of an output in bfloat16: {errors()}."
    report("generation", title, head, rows, notes)


if __name__ == "__main__":
    main()
