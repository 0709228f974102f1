"""Tiny models with one quantised linear layer, for tests of LoRA on a CPU-only machine.

`make_<backend>()` needs that backend installed and runs its real kernels on the CPU.
`stand_in_<backend>(monkeypatch)` needs no backend: it fakes just enough of the package for PEFT's
own dispatcher to build its own LoRA class around a base layer that computes x @ W.T + b.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pytest

FEATURES = 64


class TinyModel(nn.Module):
    """One linear layer called `lin`.

    GPTQ and AWQ layers have buffers only, and PEFT takes a model's first parameter: hence `anchor`.
    """

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def dense(features: int = FEATURES, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The same float layer every time; all recipes quantise this one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(features, features).to(dtype).requires_grad_(False)


# --- backends that run here --------------------------------------------------------------------


def make_bnb_8bit() -> nn.Module:
    import bitsandbytes as bnb

    base = dense()
    lin = bnb.nn.Linear8bitLt(FEATURES, FEATURES, has_fp16_weights=False, threshold=6.0)
    lin.weight = bnb.nn.Int8Params(base.weight.data, requires_grad=False, has_fp16_weights=False)
    lin.bias = base.bias
    model = TinyModel(lin.to("cpu"))  # the move to a device is what quantises
    model.is_loaded_in_8bit = True  # PEFT's dispatcher asks for it
    return model


def make_bnb_4bit(quant_type: str = "nf4") -> nn.Module:
    import bitsandbytes as bnb

    base = dense()
    lin = bnb.nn.Linear4bit(FEATURES, FEATURES, compute_dtype=torch.float32, quant_type=quant_type)
    lin.weight = bnb.nn.Params4bit(base.weight.data, requires_grad=False, quant_type=quant_type)
    lin.bias = base.bias
    model = TinyModel(lin.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def make_hqq(nbits: int = 4) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=nbits, group_size=64)
    lin = HQQLinear(dense(), config, compute_dtype=torch.float32, device="cpu")
    return TinyModel(lin)


def make_torchao_int8() -> nn.Module:
    """Int8 weights through torchao alone; PEFT can't merge into it."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = TinyModel(dense())
    quantize_(model, Int8WeightOnlyConfig())
    return model


def make_torchao_int8_mergeable() -> nn.Module:
    """The same plus what transformers' and diffusers' loaders leave on a model."""
    from torchao.quantization import Int8WeightOnlyConfig

    model = make_torchao_int8()
    config = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    model.hf_quantizer = SimpleNamespace(quantization_config=config)
    return model


def make_quanto(weights: str = "qint8") -> nn.Module:
    from optimum.quanto import freeze, quantize

    model = TinyModel(dense())
    quantize(model, weights=weights)
    freeze(model)
    return model


def make_gguf() -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    base = dense()
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = torch.from_numpy(gguf.quants.quantize(base.weight.numpy(), kind))
    lin = GGUFLinear(FEATURES, FEATURES, bias=True, compute_dtype=torch.float32)
    lin.weight = GGUFParameter(packed, quant_type=kind)
    lin.bias = base.bias
    return TinyModel(lin)


def make_aqlm(bits: int = 12) -> nn.Module:
    """Random codes: AQLM's package has no quantiser.

    8 bits would need numba. A bias would make AQLM return a view for inputs of more than two
    dimensions, and PEFT's `result += output` fails on it.
    """
    from aqlm import QuantizedLinear

    lin = QuantizedLinear(FEATURES, FEATURES, 8, 1, 1, bits, bias=False, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lin.codebooks.data.normal_(std=0.1)
        half = 2 ** (bits - 1)
        lin.codes.data.copy_(torch.randint(-half, half, lin.codes.shape))
    lin.scales.data.fill_(1.0)
    return TinyModel(lin)


def _group_grid(weight: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric scales and zero points of shape (out, groups), for `pack`."""
    groups = weight.reshape(len(weight), -1, group_size)
    scales = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    return scales, torch.full_like(scales, 2 ** (bits - 1))


def make_gptq(bits: int = 4, group_size: int = 32) -> nn.Module:
    """GPTQ's format with plain rounding; needs gptqmodel and optimum."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    base = dense()
    lin = TorchLinear(
        bits, group_size, sym=True, desc_act=False, in_features=FEATURES, out_features=FEATURES,
        bias=True,
    )  # fmt: skip
    lin.optimized = True  # post_init would call torch.compile, which needs a compiler
    scales, zeros = _group_grid(base.weight, group_size, bits)
    lin.pack_original(base, scales, zeros)
    lin.qzero_format(format=2)
    lin.post_init()
    model = TinyModel(lin.eval())
    model.quantization_method = "gptq"
    return model


def make_awq(bits: int = 4, group_size: int = 32) -> nn.Module:
    """AWQ's GEMM format with plain rounding; needs gptqmodel and optimum."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    base = dense()
    lin = AwqTorchLinear(
        bits, group_size, sym=True, desc_act=False, in_features=FEATURES, out_features=FEATURES,
        bias=True,
    )  # fmt: skip
    scales, zeros = _group_grid(base.weight, group_size, bits)
    lin.pack(base, scales, zeros)
    lin.post_init()
    model = TinyModel(lin.eval())
    model.quantization_method = "awq"
    return model


def make_inc() -> nn.Module:
    """Intel Neural Compressor's FP8 layer; needs neural-compressor, psutil and py-cpuinfo."""
    import tempfile

    from neural_compressor.torch.quantization import (
        FP8Config,
        convert,
        finalize_calibration,
        prepare,
    )

    with tempfile.TemporaryDirectory() as stats:
        config = FP8Config(
            fp8_config="E4M3",
            scale_method="maxabs_pow2",  # without one, a CPU fails with KeyError: None
            dump_stats_path=f"{stats}/stats",
            use_qdq=True,
        )
        model = prepare(TinyModel(dense(dtype=torch.bfloat16)), config)
        model(torch.linspace(-4, 4, 8 * FEATURES).to(torch.bfloat16).reshape(8, FEATURES))
        finalize_calibration(model)
        return convert(model)


# --- stand-ins for backends that are not installed ---------------------------------------------


class StandInLinear(nn.Module):
    """x @ W.T + b from a plain tensor that is neither a parameter nor called `weight`."""

    table: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        base = dense()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("table", base.weight.detach().clone())
        self.register_buffer("bias", base.bias.detach().clone())

    def int8_codes(self) -> Tensor:
        """The weight as int8, for the attribute in which the real layer has its codes."""
        return (self.table / self.table.abs().max() * 127).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.table.to(x.dtype), self.bias.to(x.dtype))


def _fake_modules(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Make `import name` work, with `contents` in its last module."""
    parts = name.split(".")
    parent = None
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        module = ModuleType(full)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
        monkeypatch.setitem(sys.modules, full, module)
        if parent is not None:
            setattr(parent, parts[depth - 1], module)
        parent = module
    vars(parent).update(contents)


def _import_afresh(monkeypatch: pytest.MonkeyPatch, name: str, available: str) -> ModuleType:
    """Import peft.tuners.lora.`name`, whose classes exist only if the backend did at its import.

    PEFT's model uses the new module's dispatcher until the monkeypatch is undone.
    """
    import peft.import_utils
    import peft.tuners.lora
    import peft.tuners.lora.model

    package = peft.tuners.lora
    full = f"{package.__name__}.{name}"
    monkeypatch.setattr(peft.import_utils, available, lambda: True)
    # PEFT's own module, so that it comes back: in sys.modules and as the package's attribute
    monkeypatch.setattr(package, name, sys.modules[full])
    monkeypatch.delitem(sys.modules, full)
    module = importlib.import_module(full)
    dispatcher = f"dispatch_{name}"
    monkeypatch.setattr(peft.tuners.lora.model, dispatcher, getattr(module, dispatcher))
    return module


def _stand_in_gptqmodel(monkeypatch: pytest.MonkeyPatch, method: str) -> nn.Module:
    import peft.tuners.lora.awq
    import peft.tuners.lora.gptq
    import peft.utils.other

    class BaseQuantLinear(StandInLinear):
        SUPPORTS_METHODS = (SimpleNamespace(value=method),)

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", self.int8_codes().to(torch.int32))

    _fake_modules(monkeypatch, "gptqmodel.nn_modules.qlinear", BaseQuantLinear=BaseQuantLinear)
    for module in (peft.tuners.lora.awq, peft.tuners.lora.gptq, peft.utils.other):
        monkeypatch.setattr(module, "is_gptqmodel_available", lambda: True)
    model = TinyModel(BaseQuantLinear())
    model.quantization_method = method
    return model


def stand_in_gptq(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    return _stand_in_gptqmodel(monkeypatch, "gptq")


def stand_in_awq(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    return _stand_in_gptqmodel(monkeypatch, "awq")


def stand_in_aqlm(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    import peft.tuners.lora.aqlm

    class QuantizedLinear(StandInLinear):  # PEFT looks at the name and at `codebooks`
        def __init__(self) -> None:
            super().__init__()
            self.codebooks = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.codes = nn.Parameter(self.int8_codes(), requires_grad=False)

    monkeypatch.setattr(peft.tuners.lora.aqlm, "is_aqlm_available", lambda: True)
    monkeypatch.setattr(peft.tuners.lora.aqlm, "QuantizedLinear", QuantizedLinear, raising=False)
    model = TinyModel(QuantizedLinear())
    model.quantization_method = "aqlm"
    return model


def stand_in_eetq(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    class EetqLinear(StandInLinear):  # PEFT looks at the name
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(self.int8_codes().T.contiguous(), requires_grad=False)

    _fake_modules(monkeypatch, "eetq", EetqLinear=EetqLinear)
    _import_afresh(monkeypatch, "eetq", "is_eetq_available")
    model = TinyModel(EetqLinear())
    model.quantization_method = "eetq"
    return model


def stand_in_inc(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    class PatchedLinear(StandInLinear):  # PEFT looks at the name
        def __init__(self) -> None:
            super().__init__()
            weight = self.table.T.contiguous().to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)

    helpers = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
    _fake_modules(monkeypatch, helpers, PatchedLinear=PatchedLinear)
    _import_afresh(monkeypatch, "inc", "is_inc_available")
    return TinyModel(PatchedLinear())


def stand_in_te(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    import peft.tuners.lora.te

    class Linear(StandInLinear):  # PEFT looks at the name
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(self.table.clone(), requires_grad=False)

    class LayerNormLinear(nn.Module): ...

    class LayerNormMLP(nn.Module): ...

    pytorch = SimpleNamespace(
        Linear=Linear, LayerNormLinear=LayerNormLinear, LayerNormMLP=LayerNormMLP
    )
    monkeypatch.setattr(peft.tuners.lora.te, "is_te_pytorch_available", lambda: True)
    monkeypatch.setattr(peft.tuners.lora.te, "te", SimpleNamespace(pytorch=pytorch), raising=False)
    return TinyModel(Linear())
