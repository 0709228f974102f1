"""What a T-LoRA adapter computes in one layer: forward and merge, from one pair of factors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from .denoisers import Layout
from .functional import Factors, autocast_dtype, delta_weight
from .integrations.offload import weights_in_place
from .linear import adapted_linear, add_update
from .ranks import ActiveRanks, Layer, groups_of
from .schedule import RankSchedule

# the containers of a layer in the order of Factors
_FACTORS = (
    "lora_A",
    "lora_B",
    "lora_lambda",
    "lora_A_init",
    "lora_B_init",
    "lora_lambda_init",
)


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
        self.ranks = ActiveRanks(layer_name, schedule, layout)
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
        x = module.lora_dropout[active_adapter](x)
        dtype = _compute_dtype(module, active_adapter, x)
        gate, first = self.ranks.gate(module, active_adapter, x, dtype, samples, batch)
        with self._factors(module, active_adapter) as factors:
            lora_A = module.lora_A[active_adapter]
            if not isinstance(lora_A, _ConvNd):
                return add_update(result, x, factors, gate, dtype, first)
            fused = factors.first(first).fused(groups_of(module))
            down, up = (factor.to(dtype) for factor in fused)
            hidden = lora_A._conv_forward(x.to(dtype), down, None) * gate
            return result + module.lora_B[active_adapter]._conv_forward(hidden, up, None)

    def forward_of_linear(self, module: Layer, adapter: str, x: Tensor) -> Tensor:
        """The output of a plain linear layer with this adapter, whose dtypes are the input's."""
        base = module.base_layer
        gate, first = self.ranks.gate(module, adapter, x, x.dtype)
        with self._factors(module, adapter) as factors:
            return adapted_linear(x, base.weight, base.bias, factors, gate, first)

    def delta_weight(self, module: Layer, adapter: str, rank: int | Tensor | None) -> Tensor:
        """The update as a weight of the base layer's shape, with the first `rank` ranks active."""
        with self._factors(module, adapter) as factors:
            down, up = factors.fused(groups_of(module))
            dtype = down.dtype
            if dtype in (torch.float16, torch.bfloat16):
                down, up = down.float(), up.float()
            gate = self.ranks.mask(module, adapter, rank, down) * module.scaling[adapter]
            delta = delta_weight(down, up, gate, groups_of(module)).to(dtype)
        return transpose(delta, getattr(module, "fan_in_fan_out", False))

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
        self.merged_rank = self.ranks.of_context(module)
        self.warn_of_one_mask(module, "Merging")

    def fix(self, module: Layer, adapter: str) -> Tensor:
        """The update of a merge, whose rank is that of the context from here on."""
        self.settle(module)
        return self.delta_weight(module, adapter, self.merged_rank)

    def warn_of_one_mask(self, module: Layer, action: str) -> None:
        """Say once that an action (a gerund) leaves one mask for all timesteps."""
        if self.ranks.follow_timestep(module):
            module.timestep_state.warn_once(
                action,
                f"{action} a T-LoRA adapter fixes its mask: from here on the weights don't depend "
                "on the timestep. The mask is that of the surrounding timestep_context, all ranks "
                "without one.",
            )

    def follow(self, module: Layer, schedule: RankSchedule) -> None:
        """Take over the schedule of a file, and warn if the config said otherwise."""
        if schedule != self.ranks.schedule and module.timestep_state is not None:
            module.timestep_state.warn_once(
                "schedule",
                f"The loaded weights of {self.ranks.layer_name} were trained with {schedule}, but "
                f"the config says {self.ranks.schedule}. The weights' own schedule is used.",
            )
        self.ranks.schedule = schedule

    def factors(self, module: Layer, adapter: str) -> Factors:
        """The factors of an adapter."""
        with self._factors(module, adapter) as factors:
            return factors

    @contextmanager
    def _factors(self, module: Layer, adapter: str) -> Iterator[Factors]:
        """The factors, in place as long as they are needed."""
        names = _FACTORS if adapter in module.lora_lambda else _FACTORS[:2]
        holders = [getattr(module, name)[adapter] for name in names]
        with weights_in_place(holders):
            factors = Factors(*[holder.weight for holder in holders])
            r, padded = module.r[adapter], len(factors.q)
            if padded > r:  # PEFT has added rows of zeros for a hotswap
                if groups_of(module) > 1:
                    raise ValueError(
                        f"{self.ranks.layer_name} has groups, so its T-LoRA factors can't be "
                        f"padded from r={r} to {padded}; call prepare_model_for_compiled_hotswap "
                        "without target_rank."
                    )
                factors = factors._replace(q=factors.q[:r], p=factors.p[:, :r])
            yield factors


def _compute_dtype(module: Layer, adapter: str, x: Tensor) -> torch.dtype:
    """The dtype in which an update is computed.

    As in PEFT it is autocast's or else that of the adapter; but accelerators compute a float32
    adapter's update of a bfloat16 input in bfloat16, as autocast would: a float32 copy of the input
    would cost more than the update.
    """
    autocast = autocast_dtype(x)
    if autocast is not None:
        return autocast
    weight = module.lora_A[adapter].weight.dtype
    on_accelerator = x.device.type != "cpu" and weight == torch.float32
    if on_accelerator and x.dtype == torch.bfloat16:
        return x.dtype
    return weight if getattr(module, "cast_input_dtype_enabled", True) else x.dtype
