"""The orthogonal initialisation of SDXL's attention against the dense SVD it stands for.

    python benchmarks/initialisation.py

Every attention projection of SDXL's U-Net (560 layers, r=64) is initialised with T-LoRA's law of
the SVD of a Gaussian matrix. The SVD's time is the median over a few layers of a shape, times the
number of such layers: the whole of it would take minutes. Both are measured in turn, on one thread.
"""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from peft_tlora.orthogonal import random_triplets

R = 64
REPEATS = 5


def sdxl_attention_shapes() -> Counter[tuple[int, int]]:
    """(out, in) of to_q, to_k, to_v and to_out.0, with their number, in SDXL's U-Net."""
    shapes: Counter[tuple[int, int]] = Counter()
    # transformer blocks of each width: 2 x 2 down and 3 x 2 up; 2 x 10 down, 10 mid and 3 x 10 up
    for width, blocks in ((640, 10), (1280, 60)):
        shapes[width, width] += 6 * blocks  # self-attention, and q and out of cross-attention
        shapes[width, 2048] += 2 * blocks  # k and v of the text
    return shapes


def seconds(function: Callable[..., object], *args: Any, **kwargs: Any) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def dense_svd(out_features: int, in_features: int) -> None:
    torch.linalg.svd(torch.randn(out_features, in_features) / R, full_matrices=False)


def ours(out_features: int, in_features: int, name: str) -> None:
    random_triplets(out_features, in_features, R, "last", seed=0, name=name)


def main() -> None:
    torch.set_num_threads(1)
    shapes = sdxl_attention_shapes()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    print(f"{sum(shapes.values())} layers, r={R}")
    print(f"{'shape':>12} {'layers':>6} {'ours ms':>9} {'SVD ms':>9} {'ratio':>7}")
    ours_total = svd_total = 0.0
    for shape, count in shapes.items():
        first = seconds(ours, *shape, "first")  # draws the shape's singular values, too
        times = [
            (seconds(ours, *shape, str(repeat)), seconds(dense_svd, *shape))
            for repeat in range(REPEATS)
        ]
        mine, theirs = (statistics.median(each) for each in zip(*times, strict=True))
        ours_total += first + mine * (count - 1)
        svd_total += theirs * count
        print(
            f"{shape[0]:>6}x{shape[1]:<5} {count:>6} {mine * 1e3:>9.1f} "
            f"{theirs * 1e3:>9.1f} {theirs / mine:>7.1f}"
        )
    print(
        f"all layers: {ours_total:.2f} s against {svd_total:.1f} s, {svd_total / ours_total:.0f}x"
    )


if __name__ == "__main__":
    main()
