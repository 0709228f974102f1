"""An adapter apart from any model and any file: each format is read into it and written from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..functional import Factors, delta_weight
from ..schedule import RankSchedule
from ..weights.fit import check_factors, check_fit, weight_of
from ..weights.names import check_name
from ..weights.start import Recipe


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
        wide = Factors(*(None if f is None else f.detach().float() for f in self.factors))  # pyright: ignore[reportArgumentType]
        down, up = wide.leading(active).fused()
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
            q, p, *_ = layer.factors
            check_fit(name, q, p, weight_of(modules, name), type(model).__name__)


def _check_layer(layer: AdapterLayer) -> None:
    check_factors(layer.factors, layer.schedule.r)
    if not (math.isfinite(layer.lora_alpha) and layer.lora_alpha >= 0):
        raise ValueError(f"lora_alpha must be finite and at least 0, got {layer.lora_alpha}.")
