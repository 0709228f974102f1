"""Writes the reference for the authors' formats: tiny files, and what their layers compute.

    python tests/references/official.py

A layer of theirs (github.com/ControlGenAI/T-LoRA, tlora/model/lora.py and flux/model/lora.py) adds

    vanilla      up(down(x) * mask)
    orthogonal   p(q(x) * lambda * mask) - base_p(base_q(x) * base_lambda * mask)

to the base layer's output, with a mask of the first r(t) ranks (tlora/trainer_sdxl.py and
flux/train.py)

    SDXL   r = int(((T - t) / T) ** alpha_rank_scale * (lora_rank - min_rank)) + min_rank
    FLUX   r = int((T - t) * (rank - min_rank) / T) + min_rank

at T = 1000. Here this is written out in float64 with plain loops, without anything of this package.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
RANK, MIN_RANK, ALPHA_RANK_SCALE, WIDTH, TEXT = 4, 1, 1.5, 6, 5
TIMESTEPS = (0, 37, 250, 500, 875, 1000)
FACTORS = (("q_layer", "p_layer", "lambda_layer"), ("base_q", "base_p", "base_lambda"))
SDXL = "down_blocks.1.attentions.0.transformer_blocks.0"
FLUX = {
    "transformer_blocks.0.attn.processor": ("to_q", "to_k", "to_v", "to_out", "to_q_proj"),
    "single_transformer_blocks.0.attn.processor": ("to_q", "to_out"),
}


def rank_sdxl(t):
    return int(((1000 - t) / 1000) ** ALPHA_RANK_SCALE * (RANK - MIN_RANK)) + MIN_RANK


def rank_flux(t):
    return int((1000 - t) * (RANK - MIN_RANK) / 1000) + MIN_RANK


def product(up, middle, down, x, active):
    """up diag(middle, masked) down x, entry by entry."""
    hidden = [sum(w * v for w, v in zip(row, x, strict=True)) for row in down.tolist()]
    hidden = [
        h * m if i < active else 0.0 for i, (h, m) in enumerate(zip(hidden, middle, strict=True))
    ]
    return [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in up.tolist()]


def vanilla(name, inputs, generator):
    return {
        f"{name}_lora.down.weight": torch.randn(RANK, inputs, generator=generator),
        f"{name}_lora.up.weight": torch.randn(WIDTH, RANK, generator=generator),
    }


def orthogonal(name, inputs, generator):
    tensors = {}
    for q, p, lam in FACTORS:
        tensors[f"{name}_lora.{q}.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{name}_lora.{p}.weight"] = torch.randn(WIDTH, RANK, generator=generator)
        tensors[f"{name}_lora.{lam}"] = torch.rand(1, RANK, generator=generator)
    return tensors


def added(tensors, name, x, active):
    """What a layer adds to the output of the base layer."""
    values = {key.removeprefix(f"{name}_lora."): t.double() for key, t in tensors.items()}
    if "down.weight" in values:
        return product(values["up.weight"], [1.0] * RANK, values["down.weight"], x, active)
    trained, start = (
        product(values[f"{p}.weight"], values[lam][0].tolist(), values[f"{q}.weight"], x, active)
        for q, p, lam in FACTORS
    )
    return [a - b for a, b in zip(trained, start, strict=True)]


def outputs(tensors, rank):
    """For each layer an input, and what it adds at each timestep."""
    names = sorted({key.partition("_lora.")[0] for key in tensors})
    reference = {}
    for name in names:
        own = {k: t for k, t in tensors.items() if k.startswith(f"{name}_lora.")}
        down = own.get(f"{name}_lora.down.weight", own.get(f"{name}_lora.q_layer.weight"))
        x = [(-1) ** i * (i + 1) / 4 for i in range(down.shape[1])]
        reference[name] = {"x": x, "added": {t: added(own, name, x, rank(t)) for t in TIMESTEPS}}
    return reference


def main():
    generator = torch.Generator().manual_seed(0)
    reference = {}
    for kind, make in (("vanilla", vanilla), ("ortho", orthogonal)):
        tensors = {}
        for attention, width in (("attn1", WIDTH), ("attn2", TEXT)):
            for target in ("to_q", "to_k", "to_v", "to_out"):
                inputs = width if target in ("to_k", "to_v") else WIDTH
                tensors |= make(f"{SDXL}.{attention}.processor.{target}", inputs, generator)
        save_file(tensors, HERE / f"official_sdxl_{kind}.safetensors")
        reference[f"official_sdxl_{kind}.safetensors"] = outputs(tensors, rank_sdxl)
    tensors = {}
    for block, targets in FLUX.items():
        for target in targets:
            tensors |= vanilla(f"{block}.{target}", WIDTH, generator)
    torch.save(tensors, HERE / "official_flux.pt")
    reference["official_flux.pt"] = outputs(tensors, rank_flux)
    (HERE / "official.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
