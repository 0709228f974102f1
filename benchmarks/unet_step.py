"""A training step and a denoising step of a U-Net with each adapter, in turn.

    python benchmarks/unet_step.py [--base sdxl] [--rank 16] [--repeats 15] [--peers LoRA T-LoRA]

SDXL's at full size in bfloat16 on a GPU, scaled down in float32 on a CPU, with adapters in all
attention projections; or the embedded base's ("toybox") in float32, in its convolutions as well. A
training step is forward, backward and AdamW, of SDXL on one picture and of the embedded base on two
with a timestep each; a denoising step is a forward of two pictures, as with guidance. The timesteps
are spread over the schedule and are tensors on the device, as trainers and pipelines have them.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from generation import TARGETS as EVERYWHERE
from measure import device, interleaved, ratio, report
from peers import PEERS, Adapted
from sdxl import TARGETS, inputs, unet
from toybox.gate import MODEL

Make = Callable[[UNet2DConditionModel, int, torch.dtype], dict[str, object]]


def toybox_inputs(model: UNet2DConditionModel, batch: int, dtype: torch.dtype) -> dict[str, object]:
    """As `inputs` of sdxl.py, of the embedded base."""
    size, width = model.config["sample_size"], model.config["cross_attention_dim"]
    return {
        "sample": torch.randn(batch, model.config["in_channels"], size, size, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 8, width, dtype=dtype),
    }


def training(
    adapted: Adapted, repeats: int, dtype: torch.dtype, batch: int, make: Make
) -> Callable:
    optimizer = torch.optim.AdamW(adapted.parameters, lr=1e-6) if adapted.parameters else None
    arguments = make(adapted.model, batch, dtype)  # pyright: ignore[reportArgumentType]

    def prepare(repeat: int) -> Callable[[], None]:
        t = 1000 * (repeat + 0.5) / repeats
        adapted.set_mask(t)

        def step() -> None:
            timestep = torch.tensor([t, 1000 - t][:batch], device=device())
            adapted.model(timestep=timestep, **arguments).sample.square().mean().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return prepare


def denoising(adapted: Adapted, repeats: int, dtype: torch.dtype, make: Make) -> Callable:
    arguments = make(adapted.model, 2, dtype)  # pyright: ignore[reportArgumentType]

    def prepare(repeat: int) -> Callable[[], None]:
        t = 1000 * (repeat + 0.5) / repeats
        adapted.set_mask(t)

        @torch.no_grad()
        def step() -> None:
            adapted.model(timestep=torch.tensor(t, device=device()), **arguments)

        return step

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sdxl", choices=["sdxl", "toybox"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    arguments = parser.parse_args()
    toybox = arguments.base == "toybox"
    full = device().type == "cuda" and not toybox
    dtype = torch.bfloat16 if full else torch.float32
    if toybox:  # the other peers have no convolutions
        arguments.peers = [p for p in arguments.peers if p in ("base", "LoRA", "T-LoRA")]
    models = {}
    for peer in arguments.peers:
        torch.manual_seed(0)
        model = UNet2DConditionModel.from_pretrained(MODEL / "unet") if toybox else unet(full)
        model = model.to(dtype).to(device())  # pyright: ignore[reportArgumentType]
        models[peer] = Adapted(peer, model, arguments.rank, EVERYWHERE if toybox else TARGETS)
    make, batch = (toybox_inputs, 2) if toybox else (inputs, 1)
    sdxl = f"SDXL's U-Net, {'full size' if full else 'scaled down'}"
    rows = []
    for name, step, peers in (
        # the base trains nothing
        ("training", partial(training, batch=batch), [p for p in arguments.peers if p != "base"]),
        ("denoising", denoising, arguments.peers),
    ):
        functions = {p: step(models[p], arguments.repeats, dtype, make=make) for p in peers}
        times = interleaved(functions, arguments.repeats)
        for peer in peers:
            median = 1e3 * sorted(times[peer])[arguments.repeats // 2]
            rows.append([name, peer, f"{median:.0f} ms", ratio(times, peer, "LoRA")[1]])
    report(
        "unet_step_toybox" if toybox else "unet_step",
        f"A step of {'the embedded base' if toybox else sdxl}, r={arguments.rank}",
        ["step", "adapter", "median", "time / LoRA's of the same round"],
        rows,
        f"{arguments.repeats} rounds, quartiles in brackets; {dtype}.",
    )


if __name__ == "__main__":
    main()
