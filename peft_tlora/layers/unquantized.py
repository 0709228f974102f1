"""T-LoRA on layers whose weight PEFT takes for a plain tensor."""

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor

from ..integrations.torch import is_traced
from .batched import ready
from .convolution import add_convolved
from .layer import TLoraLayer
from .linear import adapted_linear, add_update


class UnquantizedLayer(TLoraLayer):
    """T-LoRA on a layer whose weight PEFT takes for a plain tensor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, (batch, ..., out)."""
        if self.merged_adapters and not self._disable_adapters and not args and not kwargs:
            return self.base_layer(x)  # pyright: ignore[reportCallIssue]
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, all active ones if no names are given, into the base weight.

        Raises:
            ValueError: If the weight is quantised after all, as by quanto or GGUF: PEFT would
                change a temporary copy of it, and the adapter would silently be lost.
        """
        weight: Any = self.get_base_layer().weight
        cls = type(weight.data)
        if cls.__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
            raise ValueError(
                f"Adapters can't be merged into a {type(self.get_base_layer()).__name__} whose "
                f"weight is a {cls.__module__}.{cls.__name__} of {weight.dtype}: leave them "
                "unmerged, or merge them into the model before it is quantised."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


class Linear(UnquantizedLayer, lora.Linear):
    """T-LoRA on nn.Linear and transformers' Conv1D."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, (batch, ..., out)."""
        called = args or kwargs or self._disable_adapters or self.merged_adapters or is_traced()
        if called or x.shape[-1] != self.in_features:  # an error that is the base layer's to raise
            return super().forward(x, *args, **kwargs)
        own = ready(self, x)
        if own is None:
            return super().forward(x)
        if own.at_once:
            return adapted_linear(x, own.plain.weight, own.plain.bias, own.masked)
        result = self.base_layer(x)
        return add_update(result, x, own.masked).to(result.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert an adapter: T-LoRA at one mask, as a merge."""
        variant = self.tlora_variant(adapter_name)
        if variant is None:
            return super().supports_lora_conversion(adapter_name)
        variant.warn_of_one_mask(self, "Converting")
        return True


class _Convolution(UnquantizedLayer):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, (batch, out, ...)."""
        base: Any = self.base_layer
        called = args or kwargs or self._disable_adapters or self.merged_adapters or is_traced()
        # an error is the base layer's to raise
        if called or x.dim() != base.weight.dim() or x.shape[1] != self.in_features:
            return super().forward(x, *args, **kwargs)
        own = ready(self, x)
        if own is None:
            return super().forward(x)
        weight = None if torch.is_grad_enabled() else own.folded_weight(x)
        if weight is not None:
            return base._conv_forward(x, weight.view(base.weight.shape), base.bias)
        result, adapter = base(x), own.plain.adapter
        projections = self.lora_A[adapter], self.lora_B[adapter]
        return add_convolved(result, x, own.masked, *projections).to(result.dtype)


class Conv1d(_Convolution, lora.Conv1d):
    """T-LoRA on nn.Conv1d."""


class Conv2d(_Convolution, lora.Conv2d):
    """T-LoRA on nn.Conv2d."""


class Conv3d(_Convolution, lora.Conv3d):
    """T-LoRA on nn.Conv3d."""
