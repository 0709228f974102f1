"""What a T-LoRA adapter computes in one layer: forward and merge, from one pair of factors."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant, _ConvNd
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.functional import pad

from ..functional import Factors, autocast_dtype, delta_weight
from ..integrations.torch import is_traced, replicated
from ..schedule import RankSchedule
from ..timestep.denoisers import Layout
from .convolution import add_convolved
from .factors import Projection, Scale, plain_weight
from .linear import add_update
from .protocol import Layer, groups_of
from .ranks import ActiveRanks, Rows
from .update import Mask, Masked, is_small

_PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# the containers of a layer in the order of Factors, and the classes of their modules
_FACTORS = (
    ("lora_A", _PROJECTIONS),
    ("lora_B", _PROJECTIONS),
    ("lora_lambda", (Scale,)),
    ("lora_A_init", (Projection,)),
    ("lora_B_init", (Projection,)),
    ("lora_lambda_init", (Scale,)),
)


class TLoraVariant(LoraVariant):
    """The masked update of one T-LoRA adapter in one layer.

    `s (P diag(lam m(t)) Q - P0 diag(lam0 m(t)) Q0) x` with an orthogonal initialisation and
    `s B diag(m(t)) A x` without, where s is LoRA's scaling (arXiv 2507.05964). The modules lora_A,
    lora_B and lora_lambda hold the differences of Q, P and lam from Q0, P0 and lam0.

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
        factors = None if samples is not None else self.plain_factors(module, active_adapter)
        dtype = self.compute_dtype(module, active_adapter, x, called=factors is None)
        if factors is None:
            return result + self._update(module, active_adapter, x.to(dtype), samples, batch)
        trailing, factors = factors.dq.dim() - 2, factors.flat()
        mask = self.mask(module, active_adapter, x, dtype, factors, trailing)
        masked = Masked(factors, mask, dtype)
        if not trailing:
            return add_update(result, x, masked)
        convolutions = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return add_convolved(result, x, masked, *convolutions)

    @staticmethod
    def compute_dtype(
        module: Layer, adapter: str, x: Tensor, *, called: bool = False
    ) -> torch.dtype:
        """The dtype in which an update is computed.

        As in PEFT it is autocast's or else that of the adapter; but where the modules aren't
        called, accelerators compute a float32 adapter's update of a bfloat16 input in bfloat16, as
        autocast would: a float32 copy of the input would cost more than the update.
        """
        autocast = autocast_dtype(x)
        if autocast is not None:
            return x.dtype if called else autocast
        weight = module.lora_A[adapter].weight.dtype
        on_accelerator = x.device.type != "cpu" and weight == torch.float32
        if on_accelerator and x.dtype == torch.bfloat16 and not called:
            return x.dtype
        return weight if module.cast_input_dtype_enabled else x.dtype

    def plain_factors(self, module: Layer, adapter: str) -> Factors | None:
        """The factors of a layer without groups, if they may be read; None to call the modules."""
        if is_traced():
            return None
        modules: Any = module._modules  # pyright: ignore[reportAttributeAccessIssue]
        weights = []
        names = _FACTORS if adapter in modules["lora_lambda"]._modules else _FACTORS[:2]
        for name, classes in names:
            weight = plain_weight(modules[name]._modules[adapter], classes)
            if weight is None:
                return None
            weights.append(weight)
        factors = Factors(*weights)
        if factors.dq.dim() > 2 and groups_of(module) > 1:
            return None
        return self._unpadded(module, adapter, factors)

    def mask(
        self,
        module: Layer,
        adapter: str,
        x: Tensor,
        dtype: torch.dtype,
        factors: Factors,
        trailing: int,
    ) -> Mask:
        """The mask of the fused factors, of a dtype, for an input of a layer without groups.

        The input has `trailing` dimensions behind its features.
        """
        r, twice = factors.dq.shape[0], factors.dlam is not None
        small = is_small(factors) or trailing > 0  # no convolution has no channel
        rows = Rows(x, x.dim() - 1 - trailing, dtype)
        return self.ranks.mask_of_rows(module, adapter, rows, r, twice=twice, small=small)

    def _update(
        self,
        module: Layer,
        adapter: str,
        x: Tensor,
        samples: list[int] | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """The update of `x`, each factor by a call of its module.

        With h = (Q0 + dQ) x and d = dlam h, it is `P0 m (d + lam0 dQ x) + dP m (d + lam0 h)`.
        """
        lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
        trailing = _trailing(module)
        trained = lora_A(x)
        channel = trained.dim() - 1 - trailing
        padded = max(trained.shape[channel] - module.r[adapter], 0)  # zeros for a hotswap
        if padded:
            trained = trained.narrow(channel, 0, module.r[adapter])
        rows = Rows(trained, channel, trained.dtype, batch)
        r = trained.shape[channel]
        gate = self.ranks.gate_of_called(module, adapter, rows, r, samples)
        gate = replicated(gate, trained) if isinstance(gate, Tensor) else gate
        if adapter not in module.lora_lambda:
            return lora_B(_pad(trained * gate, padded, trailing))
        like = (lora_A, lora_B) if trailing else (None, None)
        scale = module.lora_lambda_init[adapter]
        start = module.lora_A_init[adapter](x, like[0])
        moved = module.lora_lambda[adapter](start + trained, trailing) + scale(trained, trailing)
        whole = moved + scale(start, trailing)
        moved, whole = ((part * gate).to(trained.dtype) for part in (moved, whole))
        frozen = module.lora_B_init[adapter](moved, like[1])
        return frozen + lora_B(_pad(whole, padded, trailing))

    def delta_weight(self, module: Layer, adapter: str, rank: int | Tensor | None) -> Tensor:
        """The update as a weight of the base layer's shape, with the first `rank` ranks active."""
        down, up = self.factors(module, adapter).fused(groups_of(module))
        dtype = module.lora_A[adapter].weight.dtype
        if down.dtype in (torch.float16, torch.bfloat16):
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
        if module.timestep_state is not None and self.ranks.follow_timestep(module):
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
        parts = _FACTORS if adapter in module.lora_lambda else _FACTORS[:2]
        weights = [getattr(module, name)[adapter].weight for name, _ in parts]
        return self._unpadded(module, adapter, Factors(*weights))

    def _unpadded(self, module: Layer, adapter: str, factors: Factors) -> Factors:
        """The factors without the zeros that PEFT has added for a hotswap."""
        r, padded = module.r[adapter], factors.dq.shape[0]
        if padded <= r:
            return factors
        if groups_of(module) > 1:
            raise ValueError(
                f"{self.ranks.layer_name} has groups, so its T-LoRA factors can't be "
                f"padded from r={r} to {padded}; call prepare_model_for_compiled_hotswap "
                "without target_rank."
            )
        return factors._replace(dq=factors.dq[:r], dp=factors.dp[:, :r])


def _trailing(module: Layer) -> int:
    """The dimensions after the features: those of a convolution's kernel."""
    return module._kernel_dim - 2 if isinstance(module, _ConvNd) else 0


def _pad(hidden: Tensor, padded: int, trailing: int) -> Tensor:
    """Add zeros to the ranks of (..., r, *trailing)."""
    return pad(hidden, (0, 0) * trailing + (0, padded)) if padded else hidden
