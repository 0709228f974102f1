"""Turns a plain LoRA adapter that PEFT has just made into a T-LoRA adapter."""

from typing import Any

import torch
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .config import TLoraConfig
from .denoisers import Layout
from .frozen import Recipe, checksum, random_factors
from .layer import Factor
from .orthogonal import OrthoInit, weight_triplets
from .ranks import Layer, groups_of
from .schedule import RankSchedule
from .variant import TLoraVariant

_MATRIX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def add_tlora(
    layer: Layer,
    adapter_name: str,
    config: TLoraConfig,
    layer_name: str,
    schedule: RankSchedule,
    *,
    seed: int,
    layout: Layout,
) -> None:
    """Turn a new plain LoRA adapter of a layer into a T-LoRA adapter.

    Args:
        layer: A layer that PEFT has just given the adapter `adapter_name`.
        adapter_name: Name of the adapter.
        config: Its configuration.
        layer_name: Name of the layer in the model.
        schedule: The layer's rank schedule.
        seed: Base seed of the orthogonal initialisation.
        layout: See `Denoiser.layout`.
    """
    lora_A = layer.lora_A[adapter_name]
    if isinstance(lora_A, _ConvNd):
        _match_convolution(lora_A, layer.get_base_layer())
    recipe = None
    if config.ortho_init is not None:
        recipe = _initialise(layer, adapter_name, config, config.ortho_init, layer_name, seed)
    variant = TLoraVariant(layer_name, schedule, layout)
    layer.lora_variant[adapter_name] = variant
    layer.keep_schedule(adapter_name, variant, recipe)


def _match_convolution(lora_A: _ConvNd, base: _ConvNd) -> None:
    """Make the down-projection move as the base does; PEFT leaves these at their defaults."""
    lora_A.dilation = base.dilation
    lora_A.padding_mode = base.padding_mode
    lora_A._reversed_padding_repeated_twice = base._reversed_padding_repeated_twice


@torch.no_grad()
def _initialise(
    layer: Layer,
    adapter_name: str,
    config: TLoraConfig,
    choice: OrthoInit,
    layer_name: str,
    seed: int,
) -> Recipe | None:
    q, p = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    recipe = None
    from_file = config.inference_mode and config.save_initial_factors
    if q.is_meta or from_file:
        q.zero_()
        p0, lam0, q0 = torch.zeros_like(p), q.new_zeros(len(q)), torch.zeros_like(q)
    else:
        if config.ortho_source == "weight":
            factors = _weight_factors(layer, len(q), choice, layer_name, seed)
        else:
            factors = random_factors(q, p, groups_of(layer), choice, seed=seed, name=layer_name)
        if not config.save_initial_factors:
            recipe = Recipe(choice, seed, checksum(factors))
        p0, lam0, q0 = (factor.to(q.device, q.dtype) for factor in factors)
        p0, q0 = p0.reshape(p.shape), q0.reshape(q.shape)
    layer.set_frozen(adapter_name, q0, p0, lam0, saved=config.save_initial_factors)
    if config.init_lora_weights is False:
        lam0 = torch.ones_like(lam0)
    else:
        q.copy_(q0)
        p.copy_(p0)
    layer.lora_lambda[adapter_name] = Factor(lam0.clone(), trainable=True)
    return recipe


def _weight_factors(
    layer: Layer, r: int, choice: OrthoInit, layer_name: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the singular triplets of the base layer's weight."""
    base = layer.get_base_layer()
    name = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
    weight: Any = getattr(base, name, None)
    # a quantised weight is of integers or float8, or of a tensor class that may claim to be float
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor
    if groups_of(layer) > 1 or not plain or weight.dtype not in _MATRIX_DTYPES:
        raise ValueError(
            f"ortho_source='weight' needs the layer's weight as one floating-point matrix, but "
            f"{layer_name} has {groups_of(layer)} groups and a weight of type "
            f"{type(weight).__name__}, dtype {getattr(weight, 'dtype', None)}; use "
            "ortho_source='random' or leave the layer out with exclude_modules."
        )
    matrix = transpose(weight, getattr(layer, "fan_in_fan_out", False)).flatten(1)
    return weight_triplets(matrix, r, choice, seed=seed, name=layer_name)
