"""T-LoRA on nn.MultiheadAttention, whose projections have no forward of their own."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor
from torch.func import functional_call

from .layer import TLoraLayer
from .protocol import Layer
from .variant import TLoraVariant

_IN, _OUT = "in_proj_weight", "out_proj.base_layer.weight"


class MultiheadAttention(TLoraLayer, lora.MultiheadAttention):
    """T-LoRA on the projections of nn.MultiheadAttention: one on q, k and v, one on the output.

    PEFT merges the adapters into the weights for each forward and takes them out again, which loses
    bits of a low-precision base, and it adds the update of the output projection twice. Here the
    forward runs with weights of its own, and the update is added once; a plain LoRA adapter in the
    same layer keeps PEFT's factor. All samples of a batch need the same timestep, since they share
    the weights; `lora_dropout` has no effect, as in PEFT.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend with the active adapters; arguments and results of nn.MultiheadAttention.

        Raises:
            ValueError: If the samples of the batch have different timesteps.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return super().forward(query, *args, **kwargs)
        self._check_forward_args(query, *args, **kwargs)
        base = self.get_base_layer()
        weights: dict[str, Tensor] = dict(zip((_IN, _OUT), self._weights(), strict=True))
        for name in names:
            updates = self._updates(
                name,
                lambda v, layer, name=name: v.delta_weight(layer, name, v.ranks.uniform(layer)),
            )
            for key, update in zip(weights, updates, strict=True):
                weights[key] = weights[key] + update.to(weights[key].dtype)
        output, attention = functional_call(base, weights, (query, *args), kwargs)
        return output.to(query.dtype), None if attention is None else attention.to(query.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, all active ones if no names are given, into the base weights."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                updates = self._updates(name, lambda v, layer, name=name: v.fix(layer, name))
                self._add(name, updates, check=safe_merge)
                self.merged_adapters.append(name)
                self._out_proj.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weights."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._out_proj.merged_adapters.remove(name)
            if name in self.lora_A:
                updates = self._updates(
                    name, lambda v, layer, name=name: v.delta_weight(layer, name, v.merged_rank)
                )
                self._add(name, [-update for update in updates])

    @property
    def _out_proj(self) -> Any:
        """The LoRA layer in place of the output projection."""
        base: Any = self.get_base_layer()
        return base.out_proj

    def _weights(self) -> tuple[Tensor, Tensor]:
        base: Any = self.get_base_layer()
        return base.in_proj_weight, self._out_proj.get_base_layer().weight

    def _updates(self, name: str, masked: Callable[[TLoraVariant, Layer], Tensor]) -> list[Tensor]:
        """Updates of the input and the output projection; those of T-LoRA as `masked` has them."""
        updates = []
        for layer in (self, self._out_proj):
            variant = layer.tlora_variant(name)
            if variant is not None:
                updates.append(masked(variant, layer))
            else:
                update = layer.get_delta_weight(name)
                updates.append(update if layer is self else 2 * update)
        return updates

    @torch.no_grad()
    def _add(self, name: str, updates: list[Tensor], check: bool = False) -> None:
        weights = self._weights()
        merged = [w + update.to(w.dtype) for w, update in zip(weights, updates, strict=True)]
        if check and not all(weight.isfinite().all() for weight in merged):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            )
        for weight, result in zip(weights, merged, strict=True):
            weight.data = result
