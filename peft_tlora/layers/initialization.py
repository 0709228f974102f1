"""Turns a plain LoRA adapter that PEFT has just made into a T-LoRA adapter."""

from typing import Any

import torch
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..config import TLoraConfig
from ..orthogonal import OrthoInit, weight_triplets
from ..schedule import RankSchedule
from ..timestep.denoisers import Layout
from ..weights.start import Start, new_start
from .factors import Scale, empty_scale
from .layer import TLoraLayer
from .protocol import groups_of
from .variant import TLoraVariant

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MATRIX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def begins_at_zero(config: TLoraConfig, target: nn.Module) -> bool:
    """Whether the trained projections of a layer's new adapter are zero, whatever PEFT draws."""
    base = target.get_base_layer() if isinstance(target, TLoraLayer) else target
    return (
        config.ortho_init is not None
        and config.init_lora_weights is not False
        and type(base) in _PLAIN
        and type(base.weight) is nn.Parameter
    )


def fill_with_zeros(layer: Any, adapter: str) -> None:
    """Give projections that were made on the meta device their values, where PEFT puts them."""
    for projection in (layer.lora_A[adapter], layer.lora_B[adapter]):
        for name, parameter in list(projection._parameters.items()):
            if parameter is not None:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                # registered anew, so that whoever wants empty weights gets them
                setattr(projection, name, nn.Parameter(zeros, parameter.requires_grad))
    layer._move_adapter_to_device_of_base_layer(adapter)


def add_tlora(
    layer: TLoraLayer,
    adapter_name: str,
    config: TLoraConfig,
    layer_name: str,
    start_name: str,
    schedule: RankSchedule,
    layout: Layout,
) -> None:
    """Turn a new plain LoRA adapter of a layer into a T-LoRA adapter.

    Args:
        layer: A layer that PEFT has just given the adapter `adapter_name`.
        adapter_name: Name of the adapter.
        config: Its configuration.
        layer_name: Name of the layer in the model.
        start_name: The name that the layer's start is made from.
        schedule: The layer's rank schedule.
        layout: See `Denoiser.layout`.
    """
    lora_A = layer.lora_A[adapter_name]
    base = layer.get_base_layer()
    if isinstance(lora_A, _ConvNd) and isinstance(base, _ConvNd):
        _match_convolution(lora_A, base)
    if config.ortho_init is not None:
        _initialise(layer, adapter_name, config, config.ortho_init, layer_name, start_name)
    variant = TLoraVariant(layer_name, schedule, layout)
    layer.lora_variant[adapter_name] = variant
    layer.keep_schedule(adapter_name, variant)


def _match_convolution(lora_A: _ConvNd, base: _ConvNd) -> None:
    """Make the down-projection move as the base does; PEFT leaves these at their defaults."""
    lora_A.dilation = base.dilation
    lora_A.padding_mode = base.padding_mode
    lora_A._reversed_padding_repeated_twice = base._reversed_padding_repeated_twice


@torch.no_grad()
def _initialise(
    layer: TLoraLayer,
    adapter: str,
    config: TLoraConfig,
    choice: OrthoInit,
    layer_name: str,
    start_name: str,
) -> None:
    dq, dp = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    seed, recipe = config.init_seed or 0, None
    if config.ortho_source == "random":
        start, recipe = new_start(dq, dp, groups_of(layer), choice, seed=seed, name=start_name)
    elif dq.is_meta or config.inference_mode:  # a file follows; an SVD takes long
        shapes = (dq.shape, dp.shape, (len(dq), 1))
        start = Start(*(torch.zeros(shape, device="cpu") for shape in shapes))
    else:
        start = _weight_start(layer, dq, dp, choice, layer_name, seed)
    # exact in 16 bits, so that a cast of a new adapter's factors costs nothing but what it must
    dtype = dq.dtype if dq.dtype in _MATRIX_DTYPES else torch.bfloat16
    device = "cpu" if dq.is_meta else dq.device
    start = Start(*(factor.to(device, dtype) for factor in start))
    layer.set_start(adapter, start, recipe, saved=config.save_initial_factors)
    layer.lora_lambda[adapter] = Scale(empty_scale(dq, len(dq)), trainable=True)
    if config.init_lora_weights is not False:
        dq.zero_()
        dp.zero_()


def _weight_start(
    layer: TLoraLayer, dq: Tensor, dp: Tensor, choice: OrthoInit, layer_name: str, seed: int
) -> Start:
    """The start from the singular triplets of the base layer's weight."""
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
    q0, p0, lam0 = weight_triplets(matrix, len(dq), choice, seed=seed, name=layer_name)
    return Start(q0.reshape(dq.shape), p0.reshape(dp.shape), lam0[:, None])
