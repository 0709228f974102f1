"""Which ranks of one adapter are active in one layer: now, in a merge, and as a gate."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from .denoisers import Layout
from .functional import align_ranks, pair
from .linear import Gate
from .schedule import RankSchedule, rank_mask
from .timestep import CapturedTimestep

# a peft_tlora.layer.TLoraLayer; torch types what hangs on a module as Tensor | Module
Layer: TypeAlias = Any


class ActiveRanks:
    """The active ranks of one adapter in one layer.

    Args:
        layer_name: Name of the layer in the model, for messages.
        schedule: The rank schedule.
        layout: How the batch lies in the layer's input.
    """

    def __init__(self, layer_name: str, schedule: RankSchedule, layout: Layout) -> None:
        self.layer_name = layer_name
        self.schedule = schedule
        self.layout = layout

    def uniform(self, module: Layer) -> int | Tensor | None:
        """The one rank that a forward has for all samples; None if all are active.

        Raises:
            ValueError: If the samples have different timesteps.
        """
        timestep, rank = self._current(module)
        if timestep is None or not isinstance(rank, Tensor):
            return rank
        return self._one_for_all(timestep, rank, "all samples share its weights")

    def of_context(self, module: Layer) -> int | Tensor | None:
        """The one rank that a merged weight has; None if all are active.

        Raises:
            ValueError: If the context holds several different timesteps.
        """
        state = module.timestep_state
        timestep = None if state is None else state.context
        if timestep is None:
            return None
        if not timestep.is_uniform():
            raise ValueError(
                "A merged weight has one mask for all samples, but the timestep context holds "
                f"{timestep.value}; merge in a context with a single timestep."
            )
        rank = timestep.active_rank(self.schedule)
        return rank.flatten()[0] if isinstance(rank, Tensor) else rank

    def follow_timestep(self, module: Layer) -> bool:
        """Whether the ranks follow a timestep: those of a model without time are all active."""
        state = module.timestep_state
        return self.schedule.kind != "constant" and state is not None and bool(state.denoiser)

    def mask(
        self,
        module: Layer,
        adapter: str,
        rank: int | Tensor | None,
        like: Tensor,
        first: int | None = None,
    ) -> Tensor:
        """The mask of shape (..., ranks) of the factors, with the dtype and device of `like`.

        If only the `first` ranks are computed, it is that of their columns.
        """
        # PEFT's SVD of a combination leaves fewer ranks in a layer smaller than r
        r = min(module.r[adapter], len(module.lora_A[adapter].weight)) if first is None else first
        if rank is None:
            mask = like.new_ones(r)
        else:
            mask = rank_mask(rank, r, like.device).to(like.dtype)
        if adapter in module.lora_lambda:
            by_rank = mask.movedim(-1, 0)
            mask = pair(by_rank, by_rank, groups_of(module)).movedim(0, -1)
        return mask

    def gate(
        self,
        module: Layer,
        adapter: str,
        x: Tensor,
        dtype: torch.dtype,
        samples: list[int] | None = None,
        batch: int | None = None,
    ) -> tuple[Gate, int | None]:
        """Mask times scaling in the running forward, and how many ranks have to be computed.

        Where the timestep lies on the host, these are the ranks that any sample needs. If all need
        the same, there is nothing to mask and the gate is the scaling.

        Args:
            module: The layer.
            adapter: Name of the adapter.
            x: The layer's input.
            dtype: The dtype of the gate.
            samples: If `x` holds only some samples of the forward's batch, their positions.
            batch: The number of all samples, if so.

        Returns:
            A number or a tensor that broadcasts to the output of the down-projection, and the
            number of ranks, None for all.
        """
        scaling = module.scaling[adapter]
        timestep, rank = self._current(module)
        if timestep is None:
            return scaling, None
        weight = module.lora_A[adapter].weight
        groups = 1 if weight.dim() == 2 else groups_of(module)
        first = timestep.largest_rank(self.schedule) if groups == 1 else None
        if first is not None and timestep.is_uniform():
            return scaling, first
        channel = x.dim() + 1 - weight.dim()  # the ranks take the place of the input's features

        def make() -> Tensor:
            aligned = self._align(timestep, rank, x, channel, samples, batch)
            gate = self.mask(module, adapter, aligned, x, first).to(dtype) * scaling
            before = channel + 1 - gate.dim() if gate.dim() > 1 else 0
            after = x.dim() - 1 - channel
            return gate.reshape(*gate.shape[:-1], *(1,) * before, gate.shape[-1], *(1,) * after)

        # a tensor of prepare_model_for_compiled_hotswap changes its value
        if samples is not None or isinstance(scaling, Tensor):
            return make(), first
        factors = (len(weight), adapter in module.lora_lambda)
        rows = (self.layout, channel, x.dim(), *x.shape[:channel], dtype, x.device)
        key = (self.schedule, scaling, *factors, groups, *rows)
        return timestep.shared(key, make), first

    def _current(self, module: Layer) -> tuple[CapturedTimestep | None, int | Tensor | None]:
        """The timestep of the running forward and its active ranks; None if all are active."""
        state = module.timestep_state
        if state is None or self.schedule.kind == "constant":
            return None, None
        timestep = state.current()
        return timestep, None if timestep is None else state.active_rank(timestep, self.schedule)

    def _align(
        self,
        timestep: CapturedTimestep,
        rank: int | Tensor | None,
        x: Tensor,
        channel: int,
        samples: list[int] | None,
        batch: int | None,
    ) -> int | Tensor | None:
        """Active ranks of shape (), (rows,) or (rows, tokens); None if all are active."""
        if not isinstance(rank, Tensor) or rank.dim() == 0:
            return rank
        rows = batch if batch is not None else x.shape[0] if channel > 0 else 1
        tokens = x.shape[1] if channel > 1 else None
        refusal = (
            f"it can't tell which of the {rows} rows of its input belong to which of the "
            f"{rank.shape[0]} samples"
        )
        if self.layout == "repacked":
            return self._one_for_all(timestep, rank, refusal)
        if self.layout == "sequence_first" and tokens is not None:
            aligned = align_ranks(rank, tokens, rows)
            if aligned is not None and aligned.dim() > 0:
                aligned = aligned.reshape(tokens, -1).T
        else:
            aligned = align_ranks(rank, rows, tokens)
        if aligned is None:
            return self._one_for_all(timestep, rank, refusal)
        return aligned if samples is None or aligned.dim() == 0 else aligned[samples]

    def _one_for_all(self, timestep: CapturedTimestep, rank: Tensor, refusal: str) -> Tensor:
        if timestep.is_uniform():
            return rank.flatten()[0]
        raise ValueError(
            f"The T-LoRA layer {self.layer_name} needs one timestep for the whole batch: "
            f"{refusal}. Run it with one timestep, or leave the layer out with exclude_modules."
        )


def groups_of(module: Layer) -> int:
    """Groups of the base layer: 1 unless it is a grouped convolution."""
    return getattr(module.get_base_layer(), "groups", 1)
