"""Weighted combinations of T-LoRA adapters, with the arithmetic that PEFT has for LoRA.

For the time of the combination each adapter is written as a plain LoRA: `up diag(m, m) down` with
2r columns (`functional.Factors.fused`), where the two columns of a rank lie side by side. If all
adapters have one and the same schedule, the combination has it too, in steps of as many ranks as
belong together, and the mask acts on the combined factors as it acted on each adapter's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .config import TLoraConfig
from .functional import interleave
from .layers.factors import TensorModule
from .layers.layer import TLoraLayer
from .layers.protocol import groups_of
from .schedule import RankSchedule
from .weights.state_dict import schedule_fields


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Args:
        adapters: Their names.
        combination_type: PEFT's name of the arithmetic.
        schedule: The schedule that all share; None if the combination has one mask for good.
        columns: Columns of the plain form of each rank.
    """

    adapters: list[str]
    combination_type: str
    schedule: RankSchedule | None
    columns: int

    @property
    def concatenated(self) -> bool:
        """Whether the ranks of the adapters are put side by side."""
        return self.combination_type == "cat"

    @property
    def by_weight(self) -> bool:
        """Whether the updates are combined, not their factors, and then split anew."""
        return self.combination_type.endswith("svd")

    @property
    def rank_multiple(self) -> int:
        """Columns of the combination that belong to one rank of the adapters."""
        return self.columns * (len(self.adapters) if self.concatenated else 1)


def plan_combination(
    model: nn.Module, configs: dict[str, Any], adapters: list[str], combination_type: str
) -> Combination:
    """Choose how adapters can be combined.

    Args:
        model: The model that has the adapters.
        configs: The configurations of its adapters, by name.
        adapters: Names of the adapters to be combined.
        combination_type: See `LoraModel.add_weighted_adapter`.

    Raises:
        ValueError: If the combination would have one mask for all timesteps and nobody has said
            which.
    """
    combination_type = "linear" if len(adapters) == 1 else combination_type  # as PEFT does
    found = [
        (layer, name, variant)
        for layer in model.modules()
        if isinstance(layer, TLoraLayer)
        for name in adapters
        if (variant := layer.tlora_variant(name))
    ]
    columns = 2 if any(name in layer.lora_lambda for layer, name, _ in found) else 1
    schedules = {variant.ranks.schedule for _, _, variant in found}
    grouped = any(groups_of(layer) > 1 for layer, _, _ in found)
    uneven = any(configs[name].rank_pattern for name in adapters)
    if combination_type.endswith("svd"):
        reason = f"combination_type={combination_type!r} mixes the ranks"
    elif len(schedules) > 1 or uneven:
        reason = "their ranks or their schedules differ between adapters or layers"
    elif grouped:
        reason = "a grouped convolution orders its ranks by group"
    else:
        schedule = next(iter(schedules), None)
        return Combination(adapters, combination_type, schedule, columns)
    masked = [variant.ranks.follow_timestep(layer) for layer, _, variant in found]
    chosen = [layer.timestep_state.context is not None for layer, _, _ in found]  # pyright: ignore[reportOptionalMemberAccess]
    if any(has and not is_chosen for has, is_chosen in zip(masked, chosen, strict=True)):
        raise ValueError(
            f"The adapters {adapters} can't be combined with a mask for every timestep: {reason}. "
            "Choose combination_type='cat' or 'linear' for adapters with the same r and schedule, "
            "activate them together with set_adapter, or choose the one mask of the result with "
            "`with peft_tlora.timestep_context(model, timestep):`."
        )
    return Combination(adapters, combination_type, None, columns)


@contextmanager
def as_plain_lora(
    model: nn.Module, configs: dict[str, Any], combination: Combination
) -> Iterator[None]:
    """Write the adapters of a combination as plain LoRA, and put them back at the end.

    Args:
        model: The model that has the adapters.
        configs: The configurations of its adapters, by name.
        combination: See `plan_combination`.
    """
    before = {name: configs[name] for name in combination.adapters}
    undo: list[tuple[Any, str, object]] = []
    try:
        for layer in list(model.modules()):
            if isinstance(layer, LoraLayer):
                for name in before:
                    _write_plainly(layer, name, combination, undo)
        for name, config in before.items():
            configs[name] = _plain_config(config, combination)
        yield
    finally:
        configs.update(before)
        for container, name, value in undo:
            container[name] = value


@torch.no_grad()
def order_by_rank(model: nn.Module, adapter: str, combination: Combination) -> None:
    """Bring the columns of a concatenation into an order whose prefixes are masks."""
    if not combination.concatenated or combination.schedule is None:
        return
    adapters, columns = len(combination.adapters), combination.columns
    for layer in model.modules():
        if isinstance(layer, TLoraLayer) and layer.tlora_variant(adapter):
            down: Any = layer.lora_A[adapter]
            up: Any = layer.lora_B[adapter]
            order = torch.arange(len(down.weight), device=down.weight.device)
            order = order.view(adapters, -1, columns).transpose(0, 1).flatten()
            down.weight.copy_(down.weight[order])
            up.weight.copy_(up.weight[:, order])


def _plain_config(config: TLoraConfig, combination: Combination) -> TLoraConfig:
    """A config from which PEFT derives that of the combination, by replacing r and the targets."""
    plain = copy(config)  # unchecked: it holds only together with the r that PEFT will put in
    columns = 1 if combination.by_weight else combination.columns
    plain.r = config.r * columns
    plain.rank_pattern = {key: r * columns for key, r in (config.rank_pattern or {}).items()}
    plain.use_rslora = False
    plain.ortho_init, plain.ortho_source, plain.save_initial_factors = None, "random", False
    schedule, multiple = combination.schedule, combination.rank_multiple
    if schedule is None:
        schedule = RankSchedule(1, 1.0, "constant")
        multiple = 1
    for name, value in schedule_fields(schedule).items():
        setattr(plain, name, value)
    if isinstance(schedule.min_rank, int) or multiple > 1:
        plain.min_rank = schedule.r_min * multiple
    plain.rank_multiple = schedule.rank_multiple * multiple
    return plain


def _write_plainly(
    layer: Any, adapter: str, combination: Combination, undo: list[tuple[Any, str, object]]
) -> None:
    """Exchange an adapter's factors in a layer, and note what undoes it: (container, name, value).

    What is not T-LoRA gets as many ranks by rows and columns of zeros.
    """
    columns = combination.columns
    if adapter in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        undo += [(layer.lora_embedding_A, adapter, down), (layer.lora_embedding_B, adapter, up)]
        down, up = _pad(down, columns), _pad(up.T, columns).T
        layer.lora_embedding_A[adapter] = nn.Parameter(down, requires_grad=False)
        layer.lora_embedding_B[adapter] = nn.Parameter(up, requires_grad=False)
    elif adapter in layer.lora_A:
        undo += [(layer.lora_A, adapter, layer.lora_A[adapter])]
        undo += [(layer.lora_B, adapter, layer.lora_B[adapter])]
        down, up = _plain_factors(layer, adapter, combination)
        layer.lora_A[adapter], layer.lora_B[adapter] = TensorModule(down), TensorModule(up)
        if adapter in layer.lora_variant:
            undo += [(layer.lora_variant, adapter, layer.lora_variant.pop(adapter))]


@torch.no_grad()
def _plain_factors(layer: Any, adapter: str, combination: Combination) -> tuple[Tensor, Tensor]:
    """Down- and up-projection without gate, masked if the combination has one mask."""
    variant = layer.tlora_variant(adapter) if isinstance(layer, TLoraLayer) else None
    if variant is None:
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        down, up = variant.factors(layer, adapter).fused(groups_of(layer))
        if combination.schedule is None:
            mask = variant.ranks.mask(layer, adapter, variant.ranks.of_context(layer), down)
            down = down * mask.view(-1, *(1,) * (down.dim() - 1))
        if adapter in layer.lora_lambda:
            if groups_of(layer) > 1:
                return down, up
            return interleave(down), interleave(up.transpose(0, 1)).transpose(0, 1)
    columns = combination.columns
    return _pad(down, columns), _pad(up.transpose(0, 1), columns).transpose(0, 1)


def _pad(rows: Tensor, columns: int) -> Tensor:
    """Put a row of zeros after each row if there are two columns a rank."""
    return rows if columns == 1 else interleave(torch.cat([rows, torch.zeros_like(rows)]))
