"""A training step and a denoising step of SDXL's U-Net with each adapter, in turn.

    python benchmarks/unet_step.py [--rank 16] [--repeats 15] [--peers LoRA T-LoRA]

At full size in bfloat16 on a GPU, scaled down in float32 on a CPU. Adapters are in all attention
projections. A training step is forward, backward and AdamW on one picture at one timestep; a
denoising step is a forward of two pictures, as with guidance. The timesteps are spread over the
schedule and are tensors on the device, as trainers and pipelines have them.
"""

import argparse
from collections.abc import Callable

import torch
from measure import device, interleaved, ratio, report
from peers import PEERS, Adapted
from sdxl import TARGETS, inputs, unet


def training(adapted: Adapted, repeats: int, dtype: torch.dtype) -> Callable:
    optimizer = torch.optim.AdamW(adapted.parameters, lr=1e-6) if adapted.parameters else None
    arguments = inputs(adapted.model, 1, dtype)  # pyright: ignore[reportArgumentType]

    def prepare(repeat: int) -> Callable[[], None]:
        t = 1000 * (repeat + 0.5) / repeats
        adapted.set_mask(t)

        def step() -> None:
            timestep = torch.full((1,), t, device=device())
            adapted.model(timestep=timestep, **arguments).sample.square().mean().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return prepare


def denoising(adapted: Adapted, repeats: int, dtype: torch.dtype) -> Callable:
    arguments = inputs(adapted.model, 2, dtype)  # pyright: ignore[reportArgumentType]

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
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    arguments = parser.parse_args()
    full = device().type == "cuda"
    dtype = torch.bfloat16 if full else torch.float32
    models = {}
    for peer in arguments.peers:
        torch.manual_seed(0)
        model = unet(full).to(dtype).to(device())  # pyright: ignore[reportArgumentType]
        models[peer] = Adapted(peer, model, arguments.rank, TARGETS)
    rows = []
    for name, step, peers in (
        ("training", training, [p for p in arguments.peers if p != "base"]),  # it trains nothing
        ("denoising", denoising, arguments.peers),
    ):
        functions = {peer: step(models[peer], arguments.repeats, dtype) for peer in peers}
        times = interleaved(functions, arguments.repeats)
        for peer in peers:
            median = 1e3 * sorted(times[peer])[arguments.repeats // 2]
            rows.append([name, peer, f"{median:.0f} ms", ratio(times, peer, "LoRA")[1]])
    report(
        "unet_step",
        f"A step of SDXL's U-Net, {'full size' if full else 'scaled down'}, r={arguments.rank}",
        ["step", "adapter", "median", "time / LoRA's of the same round"],
        rows,
        f"{arguments.repeats} rounds, quartiles in brackets; {dtype}.",
    )


if __name__ == "__main__":
    main()
