"""T-LoRA on quantised bases: the backends that are installed, and stand-ins for those of PEFT's."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.layers.layer import TLoraLayer

from .conftest import perturb
from .tiny import quantized

# what PEFT says of a torchao base without transformers' quantiser
pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
BACKENDS = {
    "bnb_8bit": ("bitsandbytes", "Linear8bitLt"),
    "bnb_4bit": ("bitsandbytes", "Linear4bit"),
    "hqq": ("hqq", "HqqLoraLinear"),
    "torchao_int8": ("torchao", "TorchaoLoraLinear"),
    "torchao_int8_mergeable": ("torchao", "TorchaoLoraLinear"),
    "quanto": ("optimum.quanto", "Linear"),
    "gguf": ("gguf", "Linear"),
    "aqlm": ("aqlm", "AqlmLoraLinear"),
    "gptq": ("gptqmodel", "GPTQLoraLinear"),
    "awq": ("gptqmodel", "AwqLoraLinear"),
    "inc": ("neural_compressor", "IncLoraLinear"),
}
STAND_INS = {
    "gptq": "GPTQLoraLinear",
    "awq": "AwqLoraLinear",
    "aqlm": "AqlmLoraLinear",
    "eetq": "EetqLoraLinear",
    "inc": "IncLoraLinear",
    "te": "TeLinear",
}
# how far rounding to the backend's grid may put a merged model from the unmerged one
MERGEABLE = {"bnb_8bit": 0.05, "bnb_4bit": 0.6, "hqq": 0.5, "torchao_int8_mergeable": 0.05}
TIMES = (0, 400, 1000)


def installed(package):
    return find_spec(package.partition(".")[0]) is not None and find_spec(package) is not None


REAL = [name for name, (package, _) in BACKENDS.items() if installed(package)]
CASES = [f"make_{name}" for name in REAL] + [f"stand_in_{name}" for name in STAND_INS]


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """Name of the backend, maker of the base model and name of PEFT's layer class for it."""
    kind, _, name = request.param.partition("_")
    if kind == "make":
        return name, getattr(quantized, request.param), BACKENDS[name][1]
    name = name.removeprefix("in_")
    return name, lambda: getattr(quantized, request.param)(monkeypatch), STAND_INS[name]


def adapted(make, **fields):
    fields = {"r": 4, "min_rank": 1, "lora_alpha": 6, "target_modules": ["lin"], **fields}
    torch.manual_seed(0)
    model = get_peft_model(make(), TLoraConfig(**fields))
    perturb(model, 0.1)
    return model.eval()


def batch(size=4):
    return torch.randn(size, 5, quantized.FEATURES, generator=torch.Generator().manual_seed(1))


def update(layer, x, rank, adapter="default"):
    """The masked update by the formula of the paper, in float64."""
    mask = torch.zeros(layer.r[adapter], dtype=torch.float64)
    mask[:rank] = layer.scaling[adapter]
    q0, p0, lam0 = (factor.double() for factor in layer.start(adapter))
    q, p = q0 + layer.lora_A[adapter].weight, p0 + layer.lora_B[adapter].weight
    lam, lam0 = (lam0 + layer.lora_lambda[adapter].weight)[:, 0], lam0[:, 0]
    return x.double() @ (p * lam * mask @ q - p0 * lam0 * mask @ q0).T


@torch.no_grad()
def test_the_update_is_masked_and_added_to_the_bases_output(case):
    _, make, peft_class = case
    model, x = adapted(make), batch()
    layer = model.base_model.model.lin
    assert isinstance(layer, TLoraLayer)
    assert type(layer).__name__ == peft_class
    with model.disable_adapter():
        base = model(x)
    for t, rank in ((0, 4), (400, 2), (1000, 1)):
        with timestep_context(model, t):
            found = model(x)
        assert found.dtype == base.dtype
        expected = update(layer, x, rank).to(found.dtype)
        tolerance = 2e-2 if found.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found - base, expected, atol=tolerance, rtol=tolerance)


def test_the_active_ranks_train(case):
    _, make, _ = case
    model = adapted(make, init_lora_weights=True).train()
    layer, x = model.base_model.model.lin, batch()
    with timestep_context(model, 1000):
        model(x).float().square().mean().backward()
    moved = (layer.lora_lambda["default"].weight.grad != 0).flatten()
    assert moved.tolist() == [True, False, False, False]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3
    before = model(x).detach().clone()
    torch.optim.SGD(trained, 1.0).step()
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_each_sample_of_a_mixed_batch_has_its_own_mask(case):
    _, make, _ = case
    model, x = adapted(make), batch()
    layer = model.base_model.model.lin
    names = ["default", "__base__", "default", "default"]
    with model.disable_adapter():
        base = model(x)
    with timestep_context(model, torch.tensor([0, 0, 400, 1000])):
        mixed = model(x, adapter_names=names)
    for i, rank in enumerate((4, 0, 2, 1)):
        expected = update(layer, x[i], rank).to(mixed.dtype)
        tolerance = 2e-2 if mixed.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(mixed[i] - base[i], expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_save_and_load_keep_every_bit(case, tmp_path):
    name, make, _ = case
    model, x = adapted(make), batch()
    model.save_pretrained(tmp_path)
    # PEFT's own layers for AQLM and EETQ put the base's weight on the meta device
    for low_cpu_mem_usage in (False,) if name in ("aqlm", "eetq") else (False, True):
        loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        for t in TIMES:
            with timestep_context(model, t), timestep_context(loaded, t):
                assert torch.equal(loaded.eval()(x), model(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_has_the_contexts_mask_or_is_refused(case, safe_merge):
    name, make, _ = case
    model, x = adapted(make), batch()
    with timestep_context(model, 1000):
        expected = model(x)
    before = model(x)
    if name not in MERGEABLE:
        # PEFT's own refusals, without words of AWQ and AQLM, an AttributeError of EETQ; and ours
        with pytest.raises((NotImplementedError, ValueError, AttributeError)):
            model.merge_adapter(safe_merge=safe_merge)
        assert torch.equal(model(x), before)
        return
    bound = MERGEABLE[name]
    with timestep_context(model, 1000):
        model.merge_adapter(safe_merge=safe_merge)
    assert (model(x) - expected).abs().max() < bound < (before - expected).abs().max()
    model.unmerge_adapter()  # outside of the context
    assert (model(x) - before).abs().max() < bound


@pytest.mark.parametrize("name", [name for name in ("quanto", "gguf") if name in REAL])
def test_a_weight_that_a_merge_would_lose_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"can't be merged into a .*Linear whose weight is a"):
        adapted(getattr(quantized, f"make_{name}")).merge_adapter()


def test_the_weights_triplets_of_a_quantised_base_are_refused_by_name(case):
    name, make, _ = case
    if name == "te":  # whose weight is a plain one
        adapted(make, ortho_source="weight")
        return
    with pytest.raises(ValueError, match=r"ortho_source='weight' needs .* floating-point matrix"):
        adapted(make, ortho_source="weight")


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ("bnb_4bit",) if name in REAL])
def test_a_layer_of_a_quantised_base_pickles_into_another_process(name, tmp_path):
    model = adapted(getattr(quantized, f"make_{name}"))
    torch.save(model.base_model.model.lin, tmp_path / "layer.pt")
    torch.save(batch(), tmp_path / "x.pt")
    code = (
        "import sys, torch; layer, x = (torch.load(f, weights_only=False) for f in sys.argv[1:3]);"
        "torch.save(layer(x), sys.argv[3])"
    )
    files = [tmp_path / name for name in ("layer.pt", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    assert torch.equal(torch.load(files[2]), model(batch()))
