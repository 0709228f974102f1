"""Which ranks of one adapter are active in one layer: now, in a merge, and as a gate."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import align_ranks, pair
from ..schedule import RankSchedule, rank_mask
from ..timestep.captured import CapturedTimestep
from ..timestep.denoisers import Layout
from .protocol import Layer, groups_of
from .update import Mask, Prefixes

_MULTIPLE = 16  # of ranks that are computed


class Rows(NamedTuple):
    """What a gate has to broadcast to.

    Args:
        like: A tensor of the layer's batch, tokens and ranks or features.
        channel: The dimension of its ranks or features.
        dtype: The dtype of the gate.
        batch: If the layer's input holds only some samples of the forward's batch, how many all
            are.
    """

    like: Tensor
    channel: int
    dtype: torch.dtype
    batch: int | None = None


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
        return (
            self.schedule.rank_schedule != "constant" and state is not None and state.is_followed()
        )

    def mask(self, module: Layer, adapter: str, rank: int | Tensor | None, like: Tensor) -> Tensor:
        """The mask of the fused factors, with the dtype and device of `like`."""
        # PEFT's SVD of a combination leaves fewer ranks in a layer smaller than r
        r = min(module.r[adapter], len(module.lora_A[adapter].weight))
        if rank is None:
            mask = like.new_ones(r)
        else:
            mask = rank_mask(rank, r, like.device).to(like.dtype)
        return pair(mask, mask, groups_of(module)) if adapter in module.lora_lambda else mask

    def mask_of_rows(
        self, module: Layer, adapter: str, rows: "Rows", r: int, *, twice: bool, small: bool
    ) -> Mask:
        """Mask times scaling for the fused factors of a layer without groups, in this forward.

        Where the timestep lies on the host, only the ranks that any sample needs are computed. If
        all need the same, there is nothing to mask and what is left is the scaling.

        Args:
            module: The layer.
            adapter: Name of the adapter.
            rows: The layer's input.
            r: The adapter's rank in this layer.
            twice: Whether the factors have two columns a rank.
            small: Whether it is cheaper to mask ranks than to leave them out.
        """
        timestep, rank = self._current(module)
        scaling = module.scaling[adapter]
        if timestep is None:
            return Mask(scaling)
        largest = timestep.largest_rank(self.schedule)
        if largest is not None and timestep.is_uniform():
            if largest >= r or not small:
                return Mask(scaling, ranks=largest)
            rank = largest
        if largest is not None and not small:  # libraries multiply odd numbers slower
            largest = min(r, -(-largest // _MULTIPLE) * _MULTIPLE)
        ranks = None if small else largest
        x, computed = rows.like, r if ranks is None else ranks

        def make() -> Mask:
            if not isinstance(rank, Tensor) or rank.numel() == 1:
                mask = rank_mask(r if rank is None else rank, r, x.device).to(rows.dtype)
                return Mask((mask * scaling).reshape(r, 1))
            gate = self._gate(timestep, rank, scaling, rows, computed, twice)
            if rows.channel < x.dim() - 1:  # of a convolution
                return Mask(gate=gate, ranks=ranks)
            columns = gate.shape[-1]
            full = gate.expand(*x.shape[:-1], columns).reshape(-1, columns)
            half = full[:, : columns // 2].contiguous() if twice else full
            prefixes = self._prefixes(timestep, rank, rows, scaling)
            return Mask(gate=gate, ranks=ranks, rows=full, half=half, prefixes=prefixes)

        if isinstance(scaling, Tensor):  # of prepare_model_for_compiled_hotswap: its value changes
            return make()
        shape = (x.dim(), *x.shape[: rows.channel], rows.dtype, x.device)
        key = (self.schedule, scaling, r, ranks, twice, self.layout, rows.channel, *shape)
        return timestep.shared(key, make)

    def gate_of_called(
        self, module: Layer, adapter: str, rows: "Rows", r: int, samples: list[int] | None = None
    ) -> float | Tensor:
        """Mask times scaling of r ranks that were all computed.

        Args:
            module: The layer.
            adapter: Name of the adapter.
            rows: The output of the down-projection.
            r: The adapter's rank in this layer.
            samples: If the input holds only some samples of the forward's batch, their positions.
        """
        timestep, rank = self._current(module)
        scaling = module.scaling[adapter]
        if timestep is None:
            return scaling
        return self._gate(timestep, rank, scaling, rows, r, False, samples)

    def _gate(
        self,
        timestep: CapturedTimestep,
        rank: int | Tensor | None,
        scaling: float | Tensor,
        rows: "Rows",
        r: int,
        twice: bool,
        samples: list[int] | None = None,
    ) -> Tensor:
        x, channel = rows.like, rows.channel

        def make() -> Tensor:
            aligned = self._align(timestep, rank, rows, samples)
            mask = rank_mask(r if aligned is None else aligned, r, x.device)
            mask = torch.cat([mask, mask], dim=-1) if twice else mask
            gate = mask.to(rows.dtype) * scaling
            before = channel + 1 - gate.dim() if gate.dim() > 1 else 0
            after = x.dim() - 1 - channel
            return gate.reshape(*gate.shape[:-1], *(1,) * before, gate.shape[-1], *(1,) * after)

        # a tensor of prepare_model_for_compiled_hotswap changes its value
        if samples is not None or isinstance(scaling, Tensor):
            return make()
        shape = (x.dim(), *x.shape[:channel], rows.dtype, x.device)
        key = (self.schedule, scaling, r, twice, self.layout, channel, *shape)
        return timestep.shared(key, make)

    def _current(self, module: Layer) -> tuple[CapturedTimestep | None, int | Tensor | None]:
        """The timestep of the running forward and its active ranks; None if all are active."""
        state = module.timestep_state
        if state is None or self.schedule.rank_schedule == "constant":
            return None, None
        timestep = state.current()
        if timestep is None:
            return None, None
        state.watch(timestep, self.schedule)
        return timestep, timestep.active_rank(self.schedule)

    def _prefixes(
        self,
        timestep: CapturedTimestep,
        rank: int | Tensor | None,
        rows: "Rows",
        scaling: float | Tensor,
    ) -> Prefixes | None:
        """The ranks of each sample of a linear layer's input, if the host knows them."""
        aligned = self._align(timestep, rank, rows, None)
        if not isinstance(aligned, Tensor) or aligned.dim() != 1 or rows.like.dim() != 3:
            return None
        if aligned.device.type != "cpu" or isinstance(scaling, Tensor):
            return None
        return Prefixes(tuple(aligned.tolist()), float(scaling))

    def _align(
        self,
        timestep: CapturedTimestep,
        rank: int | Tensor | None,
        rows: "Rows",
        samples: list[int] | None,
    ) -> int | Tensor | None:
        """Active ranks of shape (), (rows,) or (rows, tokens); None if all are active."""
        if not isinstance(rank, Tensor) or rank.dim() == 0:
            return rank
        x, channel = rows.like, rows.channel
        count = rows.batch if rows.batch is not None else x.shape[0] if channel > 0 else 1
        tokens = x.shape[1] if channel > 1 else None
        refusal = (
            f"it can't tell which of the {count} rows of its input belong to which of the "
            f"{rank.shape[0]} samples"
        )
        if self.layout == "repacked":
            return self._one_for_all(timestep, rank, refusal)
        sequence_first = self.layout == "sequence_first" and channel > 1
        if rank.dim() == 2 and rank.numel() != count:
            rank = self._of_tokens(rank, timestep.shard, count if sequence_first else tokens)
        if sequence_first and tokens is not None:
            aligned = align_ranks(rank, tokens, count)
            if aligned is not None and aligned.dim() > 0:
                aligned = aligned.reshape(tokens, -1).T
        else:
            aligned = align_ranks(rank, count, tokens)
        if aligned is None:
            return self._one_for_all(timestep, rank, refusal)
        return aligned if samples is None or aligned.dim() == 0 else aligned[samples]

    def _of_tokens(self, rank: Tensor, shard: tuple[int, int] | None, tokens: int | None) -> Tensor:
        """The active ranks of the tokens that a layer sees, of shape (batch, tokens) or (batch,).

        The timesteps are of tokens or of frames, whose tokens follow each other. A sample's
        noisiest one stands for it where a layer sees no tokens, or other ones.
        """
        given = rank.shape[1]
        if tokens is None or tokens == 1 or self.layout == "other_tokens":
            return rank.amin(dim=1)
        if shard is not None and tokens < given:
            part, parts = shard
            own = rank.tensor_split(parts, dim=1)[part]
            if own.shape[1] == tokens:
                return own
        elif tokens == given or (tokens % given == 0 and shard is None):
            return rank.repeat_interleave(tokens // given, dim=1)
        raise ValueError(
            f"The T-LoRA layer {self.layer_name} sees {tokens} tokens, but the timestep has "
            f"{given} for each sample, so it can't be told whose is whose. If the tokens "
            "are split over processes, it must be with diffusers' ContextParallelConfig; else "
            "leave the layer out with exclude_modules, or give one timestep a sample."
        )

    def _one_for_all(self, timestep: CapturedTimestep, rank: Tensor, refusal: str) -> Tensor:
        if timestep.is_uniform():
            return rank.flatten()[0]
        raise ValueError(
            f"The T-LoRA layer {self.layer_name} needs one timestep for the whole batch: "
            f"{refusal}. Run it with one timestep, or leave the layer out with exclude_modules."
        )
