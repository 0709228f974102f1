"""How far LyCORIS' frozen factors can be trusted that are recomputed from the base's weights.

    python benchmarks/recomputed.py

On the attention of the embedded base: singular triplets of its weights, moved by a tenth of their
norm as a training does, then recomputed from the same weights, and from weights that were rounded
in between. The error is that of the update at half of the ranks, relative to its Frobenius norm.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from peft_tlora.formats.adapter import AdapterLayer
from peft_tlora.formats.recomputed import recompute
from peft_tlora.formats.tensors import from_whole
from peft_tlora.functional import Factors
from peft_tlora.schedule import RankSchedule

MODEL = Path(__file__).parents[1] / "examples" / "toybox" / "model"
R = 16


def trained(weight, sig_type, step):
    """Q, P and lam that started as triplets of a weight and moved by `step` of their own size.

    Returns:
        These, and where they started.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    window = {"principal": slice(0, R), "last": slice(len(s) - R, len(s))}[sig_type]
    start = vh[window], u[:, window], s[window, None]
    moved = (f + step * f.norm() / f.numel() ** 0.5 * torch.randn_like(f) for f in start)
    return *moved, *start


def main():
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet")
    weights = {
        name: module.weight.data
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    print("sig_type   base              error  agreement (median)  refused")
    for sig_type in ("principal", "last"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            lost = total = refused = 0
            agreements = []
            for name, weight in weights.items():
                q, p, lam, *start = trained(weight, sig_type, 0.1)
                true, file = from_whole(q, p, lam, *start), Factors(q, p, lam)
                try:
                    found, agreement = recompute(name, file, weight.to(dtype), sig_type)
                except ValueError:
                    refused += 1
                    continue
                agreements.append(agreement)
                schedule = RankSchedule(R)
                a, b = (AdapterLayer(f, schedule, float(R)).delta(R // 2) for f in (found, true))
                lost, total = lost + (a - b).square().sum(), total + b.square().sum()
            error = float((lost / total) ** 0.5) if total else float("nan")
            middle = sorted(agreements)[len(agreements) // 2] if agreements else float("nan")
            print(f"{sig_type:<10} {dtype!s:<15} {error:>8.1e} {middle:>19.3f}  ", end="")
            print(f"{refused}/{len(weights)}")


if __name__ == "__main__":
    main()
