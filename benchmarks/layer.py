"""What an adapter costs a linear layer: forward, and forward with backward, of all peers in turn.

    python benchmarks/layer.py [--dtype float32] [--repeats 9] [--shapes 0 1 2 3] [--ranks 4 16 64]
        [--timesteps each one]

Shapes are those of attention in SDXL (self-attention at two depths, keys and values of the text)
and FLUX; number 4, not among the default ones, is the embedded base's, where Python takes the time.
Each time has the base layer in it. A batch is two pictures with a timestep each ("each"), as
trainers have it, or one picture ("one"). The timesteps are spread over the schedule and known on
the host; what is made once a forward for all layers isn't timed. Adapters are in float32, as PEFT
has them, whatever the dtype of the base.
"""

import argparse
import itertools
import math
from collections.abc import Callable

import torch
from measure import device, interleaved, ratio, report
from peers import PEERS, Adapted
from torch import nn

TIMESTEPS = ["each", "one"]
SHAPES = [(4096, 640, 640), (1024, 1280, 1280), (77, 2048, 1280), (4608, 3072, 3072), (256, 96, 96)]


def prepared(adapted: Adapted, x: torch.Tensor, backward: bool, repeats: int) -> Callable:
    """For a repeat's number, a step at the repeat's timestep."""
    context: list = []

    def prepare(repeat: int) -> Callable[[], None]:
        if context:
            context.pop().__exit__(None, None, None)
        timestep = 1000 * (repeat + 0.5) / repeats
        if len(x) == 2:
            timestep = torch.tensor([timestep, 1000 - timestep])
        context.append(adapted.at(timestep))
        context[0].__enter__()
        with torch.no_grad():
            adapted.model(x)  # makes what the layers of a model share
        for parameter in (x, *adapted.parameters):
            parameter.grad = None

        def step() -> None:
            with torch.set_grad_enabled(backward):
                output = adapted.model(x)
            if backward:
                output.backward(torch.ones_like(output))

        return step

    return prepare


def measure(
    shape: tuple[int, int, int],
    r: int,
    dtype: torch.dtype,
    backward: bool,
    repeats: int,
    timesteps: str,
) -> dict[str, list[float]]:
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    batch = 2 if timesteps == "each" else 1
    x = torch.randn(batch, tokens, inputs, device=device(), dtype=dtype, requires_grad=backward)
    weight = nn.Linear(inputs, outputs).to(device(), dtype).weight.data
    models = {}
    for peer in PEERS:
        base = nn.Sequential(nn.Linear(inputs, outputs)).to(device(), dtype)
        adapted = Adapted(peer, base, r, ["0"])
        for module in adapted.model.modules():
            if isinstance(module, nn.Linear) and module.weight.shape == weight.shape:
                module.weight.data = weight  # one place in memory, as places differ in speed
        models[peer] = prepared(adapted, x, backward, repeats)
    return interleaved(models, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(4))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--timesteps", nargs="+", default=TIMESTEPS, choices=TIMESTEPS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    rows, means = [], {}
    for timesteps, backward in itertools.product(arguments.timesteps, (False, True)):
        step = ("forward + backward" if backward else "forward") + f", timesteps: {timesteps}"
        for shape in (SHAPES[i] for i in arguments.shapes):
            for r in arguments.ranks:
                times = measure(shape, r, dtype, backward, arguments.repeats, timesteps)
                cells = []
                for peer in PEERS:
                    median, text = ratio(times, peer, "LoRA")
                    means.setdefault((step, peer), []).append(median)
                    cells.append(f"{1e3 * sorted(times[peer])[len(times[peer]) // 2]:.1f} ms")
                    cells[-1] += "" if peer == "LoRA" else f", {text}"
                rows.append([step, "{}x{}->{}".format(*shape), r, *cells])
                print(rows[-1], flush=True)
    for step in dict.fromkeys(step for step, _ in means):
        cells = [f"{math.prod(v) ** (1 / len(v)):.3f}" for v in (means[step, p] for p in PEERS)]
        rows.append([step, "geometric mean", "", *cells])
    report(
        f"layer_{arguments.dtype}",
        f"A linear layer with its adapter, {arguments.dtype}",
        ["step", "tokens x in -> out", "r", *PEERS],
        rows,
        "Medians; behind the comma the time divided by LoRA's of the same round: median and "
        f"quartiles of {arguments.repeats} rounds.",
    )


if __name__ == "__main__":
    main()
