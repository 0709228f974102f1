"""What the training stages share: the curve, the learning rate, steps and checkpoints."""

import json
import math
import os
import time
from pathlib import Path

import torch

SEED = 0


class Curve:
    """A JSONL log of one stage, echoed to the terminal."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()

    def log(self, **values: float) -> None:
        """Append one line; seconds count from the start of this process."""
        values["seconds"] = time.monotonic() - self.start
        line = json.dumps({k: round(v, 5) for k, v in values.items()})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """The learning rate: linear warmup to ``peak``, then a cosine to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimize(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One clipped step at the given learning rate."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the previous one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def generator(step: int) -> torch.Generator:
    """The random numbers of one training step."""
    return torch.Generator().manual_seed(SEED * 10_000_019 + step)
