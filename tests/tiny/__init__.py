"""Denoiser classes of diffusers, each as small as it can be built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import Tensor, nn

# classes that diffusers has in every release, but doesn't export
INNER = {
    "MultiControlNetUnionModel",
    "UNetFlatConditionModel",
    "WuerstchenDiffNeXt",
    "WuerstchenPrior",
}


@dataclass(frozen=True)
class Tiny:
    """A denoiser class, small, and the arguments of a forward.

    Args:
        make: Makes the model.
        inputs: Keyword arguments of a forward for a batch, without the timestep.
        timestep: Keyword arguments with the timestep for values of shape (batch,); None for the
            class's timestep argument alone.
        layers: Regular expression of the layers that get an adapter, None for all linear layers.
        exclude: Regular expression of the layers among them that don't.
        own_masks: Whether samples with different timesteps can be told apart in all of the layers.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    timestep: Callable[[Tensor], dict[str, Any]] | None = None
    layers: str | None = None
    exclude: str | None = None
    own_masks: bool = True


def installed(models: dict[str, Tiny]) -> dict[str, Tiny]:
    """Those of the classes that the installed diffusers has; each release adds some."""
    return {
        name: tiny for name, tiny in models.items() if name in INNER or hasattr(diffusers, name)
    }
