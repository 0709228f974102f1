"""What reading the timestep costs: a denoising step with the hook, and without it.

    python benchmarks/hook.py

The embedded base has a T-LoRA adapter in all attention projections. Without the hook the timestep
is set once, around all steps, so the layers do the same work. Both are measured in turn.
"""

import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.hooks import disconnect

MODEL = Path(__file__).parents[1] / "examples" / "toybox" / "model"
REPEATS = 200


@torch.no_grad()
def main() -> None:
    """Print the median step of both and their ratio."""
    torch.manual_seed(0)
    unets = {}
    for name in ("with", "without"):
        unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet").eval()
        unet.add_adapter(TLoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        unets[name] = unet
    disconnect(unets["without"])
    latents, text = torch.randn(2, 16, 8, 8), torch.randn(2, 32, 128)
    seconds = {name: [] for name in unets}
    with timestep_context(unets["without"], 500):
        for _ in range(REPEATS):
            for name, unet in unets.items():
                start = time.perf_counter()
                unet(latents, torch.tensor(500), text)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:>8} the hook: {1e3 * value:.2f} ms a step")
    print(f"   ratio: {medians['with'] / medians['without']:.4f}")


if __name__ == "__main__":
    main()
