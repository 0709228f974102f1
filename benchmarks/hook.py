"""What reading the timestep costs: a denoising step with the hook, and without it.

    python benchmarks/hook.py [--repeats 200]

The embedded base has a T-LoRA adapter in all attention projections. Without the hook the timestep
is set once, around all steps, so the layers do the same work. Both are measured in turn.
"""

import argparse
import statistics
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from measure import interleaved, ratio, report

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.timestep.hooks import disconnect

MODEL = Path(__file__).parents[1] / "examples" / "toybox" / "model"


def adapted_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet").eval()
    unet.add_adapter(TLoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    torch.manual_seed(0)
    unets = {"with the hook": adapted_unet(), "without": adapted_unet()}
    disconnect(unets["without"])
    latents, text = torch.randn(2, 16, 8, 8), torch.randn(2, 32, 128)
    steps = {
        name: lambda _, unet=unet: lambda: unet(latents, torch.tensor(500), text)
        for name, unet in unets.items()
    }
    with timestep_context(unets["without"], 500):
        times = interleaved(steps, parser.parse_args().repeats)
    rows = [
        [name, f"{1e3 * statistics.median(times[name]):.2f} ms", ratio(times, name, "without")[1]]
        for name in unets
    ]
    head = ["the timestep is read", "median step", "time / without"]
    report("hook", "Reading the timestep in a step of the embedded base", head, rows)


if __name__ == "__main__":
    main()
