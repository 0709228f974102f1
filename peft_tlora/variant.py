"""What a T-LoRA adapter computes in one layer: forward and merge, from one pair of factors."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .denoisers import Layout
from .functional import add_product, align_ranks, delta_weight, fuse_factors, pair
from .integrations.offload import weights_in_place
from .schedule import RankSchedule, rank_mask
from .timestep import CapturedTimestep

# a peft_tlora.layer.TLoraLayer; torch types what hangs on a module as Tensor | Module
Layer: TypeAlias = Any


class TLoraVariant(LoraVariant):
    """The masked update of one T-LoRA adapter in one layer.

    `s (P diag(lam m(t)) Q - P0 diag(lam0 m(t)) Q0) x` with an orthogonal initialisation and
    `s B diag(m(t)) A x` without, where s is LoRA's scaling (arXiv 2507.05964).

    Args:
        layer_name: Name of the layer in the model, for messages.
        schedule: The rank schedule.
        layout: How the batch lies in the layer's input.
    """

    def __init__(self, layer_name: str, schedule: RankSchedule, layout: Layout) -> None:
        self.layer_name = layer_name
        self.schedule = schedule
        self.layout = layout
        self.merged_rank: int | Tensor | None = None

    def init(self, module: Layer, adapter_name: str, **kwargs: object) -> None:
        """Nothing: where PEFT makes an adapter anew under its name, T-LoRA is added afterwards."""

    def forward(
        self,
        module: Layer,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        *,
        samples: list[int] | None = None,
        batch: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Add the masked update of `x`, (batch, ..., in) or (batch, in, ...), to `result`.

        If `x` holds only some samples of the forward's batch, `samples` are their positions and
        `batch` is the number of all.
        """
        with weights_in_place(self._holders(module, active_adapter)):
            lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
            down, up = self.factors(module, active_adapter)
            x = module.lora_dropout[active_adapter](x)
            if isinstance(lora_A, _ConvNd):
                hidden = lora_A._conv_forward(x, down, None)
                channel = hidden.dim() - lora_A.weight.dim() + 1
            else:
                hidden = nn.functional.linear(x, down)
                channel = hidden.dim() - 1
            hidden = hidden * self._gate(module, active_adapter, hidden, channel, samples, batch)
            if isinstance(lora_B, _ConvNd):
                return result + lora_B._conv_forward(hidden, up, None)
            return add_product(result, hidden, up)

    def delta_weight(self, module: Layer, adapter: str, rank: int | Tensor | None) -> Tensor:
        """The update as a weight of the base layer's shape, with the first `rank` ranks active."""
        with weights_in_place(self._holders(module, adapter)):
            down, up = self.factors(module, adapter)
            dtype = down.dtype
            if dtype in (torch.float16, torch.bfloat16):
                down, up = down.float(), up.float()
            gate = self.mask(module, adapter, rank, down) * module.scaling[adapter]
            delta = delta_weight(down, up, gate, groups_of(module)).to(dtype)
        return transpose(delta, getattr(module, "fan_in_fan_out", False))

    def uniform_rank(self, module: Layer) -> int | Tensor | None:
        """The one rank that a forward has for all samples; None if all are active.

        Raises:
            ValueError: If the samples have different timesteps.
        """
        timestep, rank = self._current_rank(module)
        if timestep is None or not isinstance(rank, Tensor):
            return rank
        return self._one_for_all(timestep, rank, "all samples share its weights")

    def context_rank(self, module: Layer) -> int | Tensor | None:
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

    def merge_safe(self, module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The base weight plus the update, whose rank this merge fixes."""
        return orig_weight + self.fix(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Layer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update, whose rank this merge fixes, to the base weight in place."""
        orig_weight.data += self.fix(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Take the update out again, at the rank that it was merged with."""
        delta = self.delta_weight(module, active_adapter, self.merged_rank)
        return orig_weight.data - delta.to(orig_weight.dtype)

    def settle(self, module: Layer) -> None:
        """Take the rank of the context for a merge that begins, and for its undoing."""
        self.merged_rank = self.context_rank(module)
        self.warn_of_one_mask(module, "Merging")

    def fix(self, module: Layer, adapter: str) -> Tensor:
        """The update of a merge, whose rank is that of the context from here on."""
        self.settle(module)
        return self.delta_weight(module, adapter, self.merged_rank)

    def has_mask(self, module: Layer) -> bool:
        """Whether the ranks follow a timestep: those of a model without time are all active."""
        state = module.timestep_state
        return self.schedule.kind != "constant" and state is not None and bool(state.denoiser)

    def warn_of_one_mask(self, module: Layer, action: str) -> None:
        """Say once that an action (a gerund) leaves one mask for all timesteps."""
        if self.has_mask(module):
            module.timestep_state.warn_once(
                action,
                f"{action} a T-LoRA adapter fixes its mask: from here on the weights don't depend "
                "on the timestep. The mask is that of the surrounding timestep_context, all ranks "
                "without one.",
            )

    def follow(self, module: Layer, schedule: RankSchedule) -> None:
        """Take over the schedule of a file, and warn if the config said otherwise."""
        if schedule != self.schedule and module.timestep_state is not None:
            module.timestep_state.warn_once(
                "schedule",
                f"The loaded weights of {self.layer_name} were trained with {schedule}, but the "
                f"config says {self.schedule}. The weights' own schedule is used.",
            )
        self.schedule = schedule

    def _holders(self, module: Layer, adapter: str) -> Iterator[nn.Module]:
        """The modules that hold the adapter's tensors in a layer."""
        yield from (module.lora_A[adapter], module.lora_B[adapter])
        if adapter in module.lora_lambda:
            yield from (module.lora_lambda[adapter], module.lora_lambda_init[adapter])
            yield from (module.lora_A_init[adapter], module.lora_B_init[adapter])

    def factors(self, module: Layer, adapter: str) -> tuple[Tensor, Tensor]:
        """Down- and up-projection, to be gated in between."""
        q, p = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        r, groups = module.r[adapter], groups_of(module)
        if len(q) > r:  # PEFT has padded them with zeros for a hotswap
            if groups > 1:
                raise ValueError(
                    f"{self.layer_name} has groups, so its T-LoRA factors can't be padded from r="
                    f"{r} to {len(q)}; call prepare_model_for_compiled_hotswap without target_rank."
                )
            q, p = q[:r], p[:, :r]
        if adapter not in module.lora_lambda:
            return q, p
        return fuse_factors(
            q,
            p,
            module.lora_lambda[adapter].weight,
            module.lora_A_init[adapter].weight,
            module.lora_B_init[adapter].weight,
            module.lora_lambda_init[adapter].weight,
            groups,
        )

    def mask(self, module: Layer, adapter: str, rank: int | Tensor | None, like: Tensor) -> Tensor:
        """The mask of shape (..., ranks) of the factors, with the dtype and device of `like`."""
        # PEFT's SVD of a combination leaves fewer ranks in a layer smaller than r
        r = min(module.r[adapter], len(module.lora_A[adapter].weight))
        if rank is None:
            mask = like.new_ones(r)
        else:
            mask = rank_mask(rank, r, like.device).to(like.dtype)
        if adapter in module.lora_lambda:
            by_rank = mask.movedim(-1, 0)
            mask = pair(by_rank, by_rank, groups_of(module)).movedim(0, -1)
        return mask

    def _gate(
        self,
        module: Layer,
        adapter: str,
        hidden: Tensor,
        channel: int,
        samples: list[int] | None,
        batch: int | None,
    ) -> Tensor:
        """Mask times scaling, broadcastable to `hidden` with its ranks in dimension `channel`.

        It is made once a forward for all layers in which it is the same.
        """
        scaling = module.scaling[adapter]
        timestep, rank = self._current_rank(module)

        def make() -> Tensor:
            aligned = self._align(timestep, rank, hidden, channel, samples, batch)
            gate = self.mask(module, adapter, aligned, hidden) * scaling
            before = channel + 1 - gate.dim() if gate.dim() > 1 else 0
            after = hidden.dim() - 1 - channel
            return gate.reshape(*gate.shape[:-1], *(1,) * before, gate.shape[-1], *(1,) * after)

        # a tensor of prepare_model_for_compiled_hotswap changes its value
        if timestep is None or samples is not None or isinstance(scaling, Tensor):
            return make()
        ranks = hidden.shape[channel]
        layout = (self.layout, channel, hidden.dim(), *hidden.shape[:2])
        kind = (ranks, adapter in module.lora_lambda, groups_of(module), hidden.dtype)
        return timestep.shared((self.schedule, scaling, *layout, *kind, hidden.device), make)

    def _current_rank(self, module: Layer) -> tuple[CapturedTimestep | None, int | Tensor | None]:
        """The timestep of the running forward and its active ranks; None if all are active."""
        state = module.timestep_state
        if state is None or self.schedule.kind == "constant":
            return None, None
        timestep = state.current()
        return timestep, None if timestep is None else state.active_rank(timestep, self.schedule)

    def _align(
        self,
        timestep: CapturedTimestep | None,
        rank: int | Tensor | None,
        hidden: Tensor,
        channel: int,
        samples: list[int] | None,
        batch: int | None,
    ) -> int | Tensor | None:
        """Active ranks of shape (), (rows,) or (rows, tokens); None if all are active."""
        if timestep is None or not isinstance(rank, Tensor) or rank.dim() == 0:
            return rank
        rows = batch if batch is not None else hidden.shape[0] if channel > 0 else 1
        tokens = hidden.shape[1] if channel > 1 else None
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
