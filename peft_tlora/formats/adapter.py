"""An adapter apart from any model and any file: each format is read into it and written from it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..frozen import Recipe
from ..functional import Factors, delta_weight
from ..schedule import (
    RANK_SCHEDULES,
    RankSchedule,
    check_choice,
    check_min_rank,
    check_multiple,
    check_positive,
)

# far above any use, and low enough that no file can ask for the memory of a machine
MAX_RANK = 65536
_PART = re.compile(r"(?!__)[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class AdapterLayer:
    """The adapter of one layer.

    Args:
        factors: Its tensors; the last four are None for Vanilla T-LoRA.
        schedule: Its rank schedule, and its rank.
        lora_alpha: LoRA's alpha.
        use_rslora: Whether the scaling is alpha / sqrt(r) in the place of alpha / r.
        recipe: What the start is made of, if a file needs no more to have it; else None.
    """

    factors: Factors
    schedule: RankSchedule
    lora_alpha: float
    use_rslora: bool = False
    recipe: Recipe | None = None

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        r = self.schedule.r
        return self.lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    @property
    def groups(self) -> int:
        """The groups of a grouped convolution, 1 for other layers."""
        return self.schedule.r // self.factors.dp.shape[1]

    @property
    def is_ortho(self) -> bool:
        """Whether it has singular values and frozen factors."""
        return self.factors.dlam is not None

    def masked(self, active: int) -> tuple[Tensor, Tensor]:
        """Down- and up-projection of the update at a mask, with the scaling in the latter.

        Args:
            active: The active ranks.

        Returns:
            Shapes (n, in, *kernel) and (out, n, *ones) in float32, with n = 2 active for an
            orthogonal adapter and n = active for Vanilla T-LoRA: nothing is lost.

        Raises:
            ValueError: If the layer is a convolution with groups.
        """
        if self.groups > 1:
            raise ValueError(
                "A convolution with groups has no plain LoRA that other programs read; leave the "
                "layer out or keep the T-LoRA formats."
            )
        first = Factors(*(None if f is None else f.detach().float() for f in self.factors))  # pyright: ignore[reportArgumentType]
        down, up = first.first(active).fused()
        return down.contiguous(), (up * self.scaling).contiguous()

    def delta(self, active: int) -> Tensor:
        """The update of the layer's weight at a mask, (out, in, *kernel) in float32."""
        down, up = self.masked(active)
        return delta_weight(down, up, torch.ones(len(down), device=down.device))


@dataclass(frozen=True)
class Adapter:
    """The adapter of one model.

    Args:
        component: Name of the model in diffusers' pipelines, such as "unet" or "transformer".
        layers: Its layers by their names in the model.
        notes: What a reader of the file had to leave out or to assume, in words.

    Raises:
        ValueError: If a layer's name, shapes or values can't be those of an adapter.
    """

    component: str
    layers: Mapping[str, AdapterLayer]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Check every layer before anything else sees it."""
        check_name(self.component)
        if not self.layers:
            raise ValueError("The adapter has no layers.")
        for name, layer in self.layers.items():
            check_name(name)
            try:
                _check_layer(layer)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Layer {name}: {error}") from None

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless a model has all layers, in the right shapes; it isn't changed.

        Raises:
            ValueError: If it isn't a model that the adapter was made for.
        """
        modules = dict(model.named_modules())
        for name, layer in self.layers.items():
            weight = weight_of(modules, name)
            if weight is None:
                raise ValueError(
                    f"The adapter doesn't fit: {type(model).__name__} has no layer {name} with a "
                    "weight. Is it for another base model?"
                )
            check_fit(name, layer.factors.dq, layer.factors.dp, weight)


def weight_of(modules: Mapping[str, nn.Module], layer: str) -> Tensor | None:
    """The weight under an adapter's layer, among a model's modules by their names."""
    # PEFT puts the adapter of attention's output into the base of the whole layer's
    for name in (f"{layer}.base_layer", layer, layer.replace(".base_layer", "")):
        module = modules.get(name)
        if module is not None:
            weight = getattr(module, "weight", getattr(module, "in_proj_weight", None))
            return weight if isinstance(weight, Tensor) else None
    return None


def check_fit(name: str, q: Tensor, p: Tensor, weight: Tensor) -> None:
    """Raise unless a layer's factors are for a weight of such a shape.

    Raises:
        ValueError: If they aren't.
    """
    found, wanted = (p.shape[0], *q.shape[1:]), tuple(weight.shape)
    # quantised weights are packed, and transformers' Conv1D holds its weight transposed
    if weight.is_floating_point() and found not in (wanted, wanted[::-1]):
        raise ValueError(
            f"The adapter doesn't fit: its layer {name} is for a weight of shape {found}, that of "
            f"the model is {wanted}. Is it for another base model?"
        )


def check_name(name: str) -> None:
    """Raise unless a name is a dotted path of plain words."""
    if not all(_PART.fullmatch(part) for part in name.split(".")):
        raise ValueError(f"{name[:200]!r} is not the name of a layer.")


def check_projections(q: Tensor, p: Tensor, r: int) -> None:
    """Raise unless two tensors can be a down- and an up-projection of rank r.

    Raises:
        ValueError: If they can't.
    """
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"its rank must lie in [1, {MAX_RANK}], got {r}.")
    if not 2 <= q.dim() <= 5 or p.dim() != q.dim() or q.shape[0] != r or 0 in q.shape + p.shape:
        raise ValueError(
            f"its factors have shapes {tuple(q.shape)} and {tuple(p.shape)}, not (r, in, ...) and "
            f"(out, r, ...) with r={r}."
        )
    whole_groups = r % p.shape[1] == 0 and len(p) % (r // p.shape[1]) == 0
    if not whole_groups or any(size != 1 for size in p.shape[2:]):
        raise ValueError(f"the up-projection of shape {tuple(p.shape)} is not one of rank {r}.")


def check_schedule(schedule: RankSchedule) -> None:
    """Raise unless all values of a schedule, which may come from a file, are in their ranges."""
    check_min_rank(schedule.min_rank, schedule.r)
    check_multiple(schedule.rank_multiple, schedule.r, schedule.min_rank)
    check_choice(schedule.kind, RANK_SCHEDULES, "rank_schedule")
    check_positive(schedule.exponent, "schedule_exponent")
    check_positive(schedule.num_train_timesteps, "num_train_timesteps")


def _check_layer(layer: AdapterLayer) -> None:
    q, p, *rest = layer.factors
    r = layer.schedule.r
    check_projections(q, p, r)
    if any(f is None for f in rest) != all(f is None for f in rest):
        raise ValueError("only some of the singular values and frozen factors are there.")
    for tensor, wanted in zip(rest, ((r, 1), q.shape, p.shape, (r, 1)), strict=True):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} should be {tuple(wanted)}.")
    for tensor in layer.factors:
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"a factor is of {tensor.dtype}, not of floating point.")
    check_schedule(layer.schedule)
    if not (math.isfinite(layer.lora_alpha) and layer.lora_alpha >= 0):
        raise ValueError(f"lora_alpha must be finite and at least 0, got {layer.lora_alpha}.")
