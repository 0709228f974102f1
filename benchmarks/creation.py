"""Seconds that get_peft_model takes to make an adapter of each kind.

    python benchmarks/creation.py [--rank 64] [--repeats 9]

The base has SDXL's attention projections at 640 and 1280 features, a quarter of them. What earlier
models have left behind is collected before, and isn't timed.
"""

import argparse
import gc
from collections.abc import Callable

import torch
from measure import interleaved, ratio, report
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_tlora import TLoraConfig

WIDTHS = {640: 40, 1280: 100}  # and how many layers
CONFIGS = {
    "LoRA": LoraConfig,
    "T-LoRA": TLoraConfig,
    "Vanilla T-LoRA": lambda **kwargs: TLoraConfig(ortho_init=None, **kwargs),
}


def base() -> nn.Module:
    with torch.device("meta"):
        layers = [nn.Linear(width, width) for width, count in WIDTHS.items() for _ in range(count)]
    return nn.Sequential(*layers).to_empty(device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    def prepared(name: str) -> Callable[[int], Callable[[], object]]:
        def prepare(repeat: int) -> Callable[[], object]:
            model = base()
            config = CONFIGS[name](r=arguments.rank, target_modules=r"\d+")
            gc.collect()
            return lambda: get_peft_model(model, config)

        return prepare

    times = interleaved({name: prepared(name) for name in CONFIGS}, arguments.repeats)
    rows = []
    for name, seconds in times.items():
        median = sorted(seconds)[arguments.repeats // 2]
        rows.append([name, f"{median:.2f} s", ratio(times, name, "LoRA")[1]])
    title = f"Making an adapter of {sum(WIDTHS.values())} linear layers, r={arguments.rank}"
    report("creation", title, ["adapter", "median", "time / LoRA's of the same round"], rows)


if __name__ == "__main__":
    main()
