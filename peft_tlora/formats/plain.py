"""Plain LoRA at one mask: exact with 2r columns, or cut to a given rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import RankSchedule
from ..weights.names import check_name
from .adapter import Adapter
from .names import Place


@dataclass(frozen=True)
class PlainLora:
    """A LoRA adapter whose update is `up down`, without further scaling.

    Args:
        component: Name of the model in diffusers' pipelines.
        layers: Down- and up-projection, (n, in, *kernel) and (out, n, *ones), by layer.
        error: What cutting to a rank has lost: the Frobenius norm of the change of all updates,
            relative to that of the updates. 0 if nothing was cut.
    """

    component: str
    layers: Mapping[str, tuple[Tensor, Tensor]]
    error: float = 0.0


def plain_lora(
    adapter: Adapter,
    *,
    timestep: float | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> PlainLora:
    """The plain LoRA that does what an adapter does at one timestep.

    A layer of an orthogonal adapter gets two columns for each active rank and is exact; with `rank`
    it is the best approximation of at most that rank. Layers without active ranks are left out.

    Args:
        adapter: The adapter.
        timestep: The timestep whose mask is taken, in the unit of the model; all ranks if None.
        rank: The largest rank of a layer; None for exact layers.
        dtype: The dtype of the tensors.

    Raises:
        ValueError: If no layer has an active rank, the rank or the timestep is out of range, or a
            layer isn't finite or is a convolution with groups.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    layers, lost, total = {}, 0.0, 0.0
    for name, layer in adapter.layers.items():
        schedule = layer.schedule
        active = schedule.r if timestep is None else _active(schedule, float(timestep))
        if not active:
            continue
        down, up = layer.masked(active)
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"Layer {name} has values that are not finite: the file is damaged.")
        if rank is not None and len(down) > rank:
            down, up, norm, cut = _truncated(down, up, rank)
            lost, total = lost + cut**2, total + norm**2
        elif rank is not None:
            total += float(spectrum(down, up).square().sum())
        layers[name] = down.to(dtype), up.to(dtype)
    if not layers:
        raise ValueError(f"No rank is active at timestep {timestep}: there is nothing to write.")
    return PlainLora(adapter.component, layers, (lost / total) ** 0.5 if total else 0.0)


def _active(schedule: RankSchedule, timestep: float) -> int:
    if not schedule.allows(timestep):
        raise ValueError(
            f"timestep must lie in the range that the model counts in, got {timestep:g} for "
            f"{schedule}."
        )
    return schedule.active_rank(timestep)


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of a product, its norm and that of what is lost."""
    left, right, (u, s, vh) = _svd(down, up)
    root = s[:rank].sqrt()
    new_up = (left @ u[:, :rank] * root).float()
    new_down = (root[:, None] * (vh[:rank] @ right.mT)).float()
    return (
        new_down.reshape(-1, *down.shape[1:]),
        new_up.reshape(len(up), -1, *up.shape[2:]),
        float(s.norm()),
        float(s[rank:].norm()),
    )


def spectrum(down: Tensor, up: Tensor) -> Tensor:
    """The singular values of a product of two thin factors, in float64."""
    return _svd(down, up)[2][1]


def _svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A product as `left u s vh right^T`: the SVD of a small matrix between two frames."""
    left, small_left = torch.linalg.qr(up.flatten(1).double())
    right, small_right = torch.linalg.qr(down.flatten(1).mT.double())
    return left, right, torch.linalg.svd(small_left @ small_right.mT, full_matrices=False)


def fused(layers: Mapping[str, tuple[Tensor, Tensor]], places: Mapping[str, Place]) -> dict:
    """Layers by their original names, those that the original has as one put together.

    The rows of a layer that isn't there are zero.

    Args:
        layers: Down- and up-projections by diffusers' names.
        places: Where each of them is in the original model.
    """
    parts: dict[str, dict[int | None, tuple[Tensor, Tensor]]] = {}
    shares: dict[str, tuple[int, ...]] = {}
    for name, pair in layers.items():
        place = places[name]
        check_name(place.name)
        parts.setdefault(place.name, {})[place.slot] = pair
        shares[place.name] = place.shares
    return {
        name: pairs[None] if None in pairs else _stacked(pairs, shares[name])
        for name, pairs in parts.items()
    }


def _stacked(
    pairs: Mapping[int | None, tuple[Tensor, Tensor]], shares: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    unit = next(len(up) // shares[slot] for slot, (_, up) in pairs.items() if slot is not None)
    down = torch.cat([pairs[slot][0] for slot in range(len(shares)) if slot in pairs])
    blocks = []
    column = 0
    for slot, share in enumerate(shares):
        rows = down.new_zeros(unit * share, len(down))
        if slot in pairs:
            up = pairs[slot][1]
            rows[:, column : column + up.shape[1]] = up
            column += up.shape[1]
        blocks.append(rows)
    return down, torch.cat(blocks)
