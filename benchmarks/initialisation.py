"""The orthogonal initialisation of SDXL's attention against the dense SVD it stands for.

    python benchmarks/initialisation.py

Every attention projection of SDXL's U-Net (560 layers, r=64) is initialised with T-LoRA's law of
the SVD of a Gaussian matrix. The SVD's time is the median over a few layers of a shape, times the
number of such layers: the whole of it would take minutes. Both are measured in turn.
"""

from collections.abc import Callable

import torch
from measure import interleaved, ratio, report, seconds
from sdxl import attention_shapes

from peft_tlora.orthogonal import random_triplets

R = 64
REPEATS = 7


def main() -> None:
    rows, totals = [], {"T-LoRA": 0.0, "dense SVD": 0.0}
    for (outputs, inputs), count in attention_shapes().items():

        def ours(repeat: int, out: int = outputs, into: int = inputs) -> Callable[[], object]:
            return lambda: random_triplets(out, into, R, "last", seed=0, name=str(repeat))

        def svd(repeat: int, out: int = outputs, into: int = inputs) -> Callable[[], object]:
            return lambda: torch.linalg.svd(torch.randn(out, into) / R, full_matrices=False)

        first = seconds(ours(-1))  # draws the singular values, which a shape's layers share
        times = interleaved({"T-LoRA": ours, "dense SVD": svd}, REPEATS)
        medians = {name: sorted(values)[REPEATS // 2] for name, values in times.items()}
        totals["T-LoRA"] += first + medians["T-LoRA"] * (count - 1)
        totals["dense SVD"] += medians["dense SVD"] * count
        cells = [f"{1e3 * medians[name]:.1f} ms" for name in totals]
        rows.append([f"{outputs}x{inputs}", count, *cells, ratio(times, "dense SVD", "T-LoRA")[1]])
    cells = [f"{seconds:.2f} s" for seconds in totals.values()]
    rows.append(["all", 560, *cells, f"{totals['dense SVD'] / totals['T-LoRA']:.0f}"])
    head = ["shape", "layers", *totals, "SVD / T-LoRA"]
    report("initialisation", f"Initialising SDXL's attention layers at r={R}", head, rows)


if __name__ == "__main__":
    main()
