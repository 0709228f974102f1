"""Adapters as the files of other trainers: their names and shapes, written out."""

import inspect
from dataclasses import replace

import torch
from safetensors.torch import save_file

OFFICIAL_ORTHO = ("q_layer.weight", "p_layer.weight", "lambda_layer", "base_q.weight")
OFFICIAL_ORTHO += ("base_p.weight", "base_lambda")


def factors_of(layer):
    """Q, P and lam whole, and where they started, as all other programs have them."""
    dq, dp, dlam, q0, p0, lam0 = layer.factors
    if dlam is None:
        return dq, dp, None, None, None, None
    return q0 + dq, p0 + dp, lam0 + dlam, q0, p0, lam0


def read_back(adapter):
    """What such a file says: the differences of its float32 factors, and a start of its own."""
    layers = {}
    for name, layer in adapter.layers.items():
        q, p, lam, q0, p0, lam0 = factors_of(layer)
        if lam is not None:
            factors = type(layer.factors)(q - q0, p - p0, lam - lam0, q0, p0, lam0)
            layer = replace(layer, factors=factors, recipe=None)
        layers[name] = layer
    return replace(adapter, layers=layers)


def official_sdxl(adapter):
    return {
        key: tensor
        for name, layer in adapter.layers.items()
        for key, tensor in _official(
            name.replace(".to_", ".processor.to_").removesuffix(".0"), layer
        ).items()
    }


def official_flux(adapter):
    """Vanilla only; the trainer's dead adapters of single blocks are there, too."""
    tensors = {}
    for name, layer in adapter.layers.items():
        block, _, target = name.partition(".attn.")
        target = target.replace("add_", "to_").removesuffix(".0")
        tensors |= _official(f"{block}.attn.processor.{target}", layer)
        if block.startswith("single") and target == "to_q":
            for dead in ("to_out", "to_q_proj", "to_k_proj", "to_v_proj"):
                tensors |= _official(f"{block}.attn.processor.{dead}", layer)
    return tensors


def _official(name, layer):
    q, p, lam, q0, p0, lam0 = factors_of(layer)
    if lam is None:
        return {f"{name}_lora.down.weight": q, f"{name}_lora.up.weight": p}
    factors = q, p, lam.reshape(1, -1), q0, p0, lam0.reshape(1, -1)
    return {
        f"{name}_lora.{ending}": factor
        for ending, factor in zip(OFFICIAL_ORTHO, factors, strict=True)
    }


def sd_scripts(adapter, rename=lambda name: name, flat=True):
    """Convolutions are matrices in the orthogonal mode, the scaling is alpha / r."""
    return _underscored(adapter, "lora_unet_", "base_lambda_buf", rename, flat)


def takenoko(adapter, rename=lambda name: name):
    """Beside the orthogonal factors there are LoRA's, which do nothing."""
    tensors = _underscored(adapter, "t_lora_unet_", "base_lambda", rename, False)
    for key in [key for key in tensors if key.endswith(".q_layer.weight")]:
        name = key.removesuffix(".q_layer.weight")
        tensors[f"{name}.lora_down.weight"] = torch.ones_like(tensors[key])
        tensors[f"{name}.lora_up.weight"] = torch.zeros_like(tensors[f"{name}.p_layer.weight"])
    return tensors


def lycoris(adapter, prefix="lycoris_"):
    tensors = _underscored(adapter, prefix, "base_lambda", lambda name: name, False)
    return {key: tensor for key, tensor in tensors.items() if ".base_" not in key}


def _underscored(adapter, prefix, base_lambda, rename, flat):
    tensors = {}
    for name, layer in adapter.layers.items():
        key = prefix + rename(name).replace(".", "_")
        q, p, lam, q0, p0, lam0 = factors_of(layer)
        tensors[f"{key}.alpha"] = torch.tensor(layer.lora_alpha)
        if lam is None:
            tensors |= {f"{key}.lora_down.weight": q, f"{key}.lora_up.weight": p}
            continue
        if flat:
            q, p, q0, p0 = (f.flatten(1) for f in (q, p, q0, p0))
        tensors |= {
            f"{key}.q_layer.weight": q,
            f"{key}.p_layer.weight": p,
            f"{key}.lambda_layer": lam.reshape(1, -1),
            f"{key}.base_q.weight": q0,
            f"{key}.base_p.weight": p0,
            f"{key}.{base_lambda}": lam0.reshape(1, -1),
        }
    return tensors


def save(path, tensors, metadata=None):
    """Write tensors, pickled if the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        inspect.unwrap(save_file)(tensors, path, metadata)  # without the notice of half a file
    return path
