"""T-LoRA layers: PEFT's LoRA layers with singular values, frozen factors and a timestep.

PEFT makes each layer, so that its dispatch and its handling of several adapters stay in force; a
T-LoRA layer then takes its place, and the masked update becomes the adapter's variant, which is
PEFT's way to change what a LoRA layer computes.
"""

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import layer as lora
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .config import TLoraConfig
from .denoisers import Layout
from .orthogonal import OrthoInit, random_triplets, weight_triplets
from .schedule import RankSchedule, decode_schedule, encode_schedule
from .timestep import TimestepState
from .variant import Layer, TLoraVariant, groups_of

_BUFFERS = ("lora_A_init", "lora_B_init", "lora_lambda_init", "lora_schedule")


class TLoraLayer(lora.LoraLayer):
    """A LoRA layer some of whose adapters are T-LoRA; mixed into PEFT's layer classes."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_lambda")
    other_param_names = (*lora.LoraLayer.other_param_names, *_BUFFERS)
    timestep_state: TimestepState | None = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Weight of the update at the timestep of the context, at full rank without one."""
        variant = self.lora_variant.get(adapter)
        if isinstance(variant, TLoraVariant):
            return variant.delta_weight(self, adapter, variant.context_rank(self))
        return super().get_delta_weight(adapter)  # pyright: ignore[reportAttributeAccessIssue]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move without PEFT's cast to the base layer's dtype.

        PEFT calls this after it has put a file's tensors into an adapter made on the meta device.
        Rounding the trained and the frozen factors there would lose most of their difference.
        """
        if adapter_name not in self.lora_variant:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, name)
            if isinstance(container, nn.Module) and adapter_name in container:  # pyright: ignore[reportOperatorIssue]
                container[adapter_name] = container[adapter_name].to(device)  # pyright: ignore[reportIndexIssue]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Load, and follow the schedule that the weights were trained with."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportAttributeAccessIssue]
        for adapter, variant in self.lora_variant.items():
            encoded = state_dict.get(f"{prefix}lora_schedule.{adapter}")
            if encoded is not None and isinstance(variant, TLoraVariant):
                variant.follow(self, decode_schedule(encoded, self.r[adapter])[0])


class Linear(TLoraLayer, lora.Linear):
    """T-LoRA on nn.Linear and transformers' Conv1D."""


class Conv1d(TLoraLayer, lora.Conv1d):
    """T-LoRA on nn.Conv1d."""


class Conv2d(TLoraLayer, lora.Conv2d):
    """T-LoRA on nn.Conv2d."""


class Conv3d(TLoraLayer, lora.Conv3d):
    """T-LoRA on nn.Conv3d."""


_LAYER_CLASSES: dict[type, type[TLoraLayer]] = {
    lora.Linear: Linear,
    lora.Conv1d: Conv1d,
    lora.Conv2d: Conv2d,
    lora.Conv3d: Conv3d,
}


def as_tlora_layer(layer: nn.Module, layer_name: str) -> Layer:
    """The T-LoRA layer that takes the place of one of PEFT's LoRA layers.

    It shares all of the layer's state, so that its adapters and hooks stay in force.

    Raises:
        TypeError: If T-LoRA doesn't support this kind of layer.
    """
    if isinstance(layer, TLoraLayer):
        return layer
    if type(layer) not in _LAYER_CLASSES:
        raise TypeError(
            f"T-LoRA does not support {type(layer).__module__}.{type(layer).__name__} at "
            f"{layer_name}; leave it out with exclude_modules."
        )
    cls = _LAYER_CLASSES[type(layer)]
    extended: Layer = cls.__new__(cls)
    object.__setattr__(extended, "__dict__", layer.__dict__)
    extended.lora_lambda = nn.ParameterDict()
    for name in _BUFFERS:
        setattr(extended, name, BufferDict(persistent=True))
    return extended


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
    if config.ortho_init is not None:
        _initialise(layer, adapter_name, config, config.ortho_init, layer_name, seed)
    layer.lora_variant[adapter_name] = TLoraVariant(layer_name, schedule, layout)
    encoded = encode_schedule(
        schedule, layer.lora_alpha[adapter_name], layer.use_rslora[adapter_name]
    )
    device = lora_A.weight.device
    # a load with low_cpu_mem_usage makes the weights on the meta device
    layer.lora_schedule[adapter_name] = encoded if device.type == "meta" else encoded.to(device)


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
) -> None:
    q, p = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if q.is_meta:  # the values come from a file
        p0, lam0, q0 = torch.empty_like(p), q.new_empty(len(q)), torch.empty_like(q)
    else:
        if config.ortho_source == "weight":
            factors = _weight_factors(layer, len(q), choice, layer_name, seed)
        else:
            factors = _random_factors(layer, q, p, choice, layer_name, seed)
        p0, lam0, q0 = (factor.to(q.device, q.dtype) for factor in factors)
        p0, q0 = p0.reshape(p.shape), q0.reshape(q.shape)
    layer.lora_A_init[adapter_name] = q0
    layer.lora_B_init[adapter_name] = p0
    layer.lora_lambda_init[adapter_name] = lam0
    if config.init_lora_weights is False:
        lam0 = torch.ones_like(lam0)
    else:
        q.copy_(q0)
        p.copy_(p0)
    layer.lora_lambda[adapter_name] = nn.Parameter(lam0.clone())


def _random_factors(
    layer: Layer, q: Tensor, p: Tensor, choice: OrthoInit, layer_name: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Initial P, lambda and Q as matrices; each group of a grouped convolution has its own draw."""
    groups = groups_of(layer)
    draws = [
        random_triplets(
            len(p) // groups,
            q[0].numel(),
            len(q) // groups,
            choice,
            seed=seed,
            name=f"{layer_name}/{group}",
        )
        for group in range(groups)
    ]
    p0, lam0, q0 = (torch.cat(factors) for factors in zip(*draws, strict=True))
    return p0, lam0, q0


def _weight_factors(
    layer: Layer, r: int, choice: OrthoInit, layer_name: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the singular triplets of the base layer's weight."""
    weight = layer.get_base_layer().weight
    if groups_of(layer) > 1 or not weight.is_floating_point():
        raise ValueError(
            f"ortho_source='weight' needs the layer's weight as one floating-point matrix, but "
            f"{layer_name} has {groups_of(layer)} groups and dtype {weight.dtype}; use "
            "ortho_source='random' or leave the layer out with exclude_modules."
        )
    matrix = transpose(weight, getattr(layer, "fan_in_fan_out", False)).flatten(1)
    return weight_triplets(matrix, r, choice, seed=seed, name=layer_name)
