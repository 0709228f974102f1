"""T-LoRA on the linear layers of quantised bases."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from peft.tuners.lora import layer as lora
from torch import Tensor

from .layer import TLoraLayer

# PEFT's layer for a quantised base -> its module; the classes exist where the backend is installed
_MODULES = {
    "AqlmLoraLinear": "aqlm",
    "AwqLoraLinear": "awq",
    "EetqLoraLinear": "eetq",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "IncLoraLinear": "inc",
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "TeLinear": "te",
    "TorchaoLoraLinear": "torchao",
}


class QuantizedLinear(TLoraLayer):
    """T-LoRA on a quantised linear layer; mixed into PEFT's class for its backend.

    PEFT's AWQ, AQLM, EETQ and TE layers would ignore the mask, so all backends share the forward of
    `lora.Linear`: the base's own output plus the updates of the active adapters. Merging is PEFT's,
    where it has it, with the mask fixed as in other layers.
    """

    _unmerging = False
    forward = lora.Linear.forward

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, all active ones if no names are given, into the quantised weight."""
        for name in adapter_names or self.active_adapters:
            variant = self.tlora_variant(name)
            if variant is not None and name not in self.merged_adapters:
                variant.settle(self)
        with self._keeping_base():
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Take the merged adapters out again, each at the rank that it was merged with."""
        self._unmerging = True
        try:
            with self._keeping_base():
                super().unmerge()
        finally:
            self._unmerging = False

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Weight of the update; PEFT's torchao layer asks for it where others ask the variant."""
        variant = self.tlora_variant(adapter)
        if variant is None or not self._unmerging:
            return super().get_delta_weight(adapter)
        return variant.delta_weight(self, adapter, variant.merged_rank)

    @contextmanager
    def _keeping_base(self) -> Iterator[None]:
        """Keep what PEFT's merge would misread or lose of the base layer.

        On CPUs with bfloat16 instructions the first inference of bitsandbytes' 4-bit layer packs
        its weight in another way, and only its state dict unpacks it. PEFT's HQQ layer quantises
        the merged weight into a new base layer without the bias.
        """
        self.get_base_layer().state_dict()
        bias = getattr(self.get_base_layer(), "bias", None)
        yield
        base: Any = self.get_base_layer()
        if bias is not None and base.bias is None:
            base.bias = bias


def quantized_class(cls: type) -> type[TLoraLayer] | None:
    """The T-LoRA class for one of PEFT's quantised layers; None for other classes."""
    if cls.__module__ != f"{lora.__package__}.{_MODULES.get(cls.__name__)}":
        return None
    return getattr(sys.modules[__name__], cls.__name__)


def __getattr__(name: str) -> Any:
    """Make the class for a backend when it is asked for, also by an unpickler."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plain = getattr(import_module(f"{lora.__package__}.{_MODULES[name]}"), name)
    return globals().setdefault(
        name, type(name, (QuantizedLinear, plain), {"__module__": __name__})
    )
