"""FusedGeneration: the masked adapter's pictures with the base's operations, the base untouched."""

import itertools

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from peft_tlora import FusedGeneration, TLoraConfig, active_rank, timestep_context

from .conftest import TinyDenoiser, adapted, perturb, tiny_unet
from .tiny import pipelines, quantized
from .tiny.pipelines import denoiser, generate

MAKE = {"unet": pipelines.stable_diffusion, "transformer": pipelines.flux}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FIELDS = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "min_rank": 1}
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def with_adapter(kind, **fields):
    pipeline = MAKE[kind]()
    denoiser(pipeline).add_adapter(TLoraConfig(**{**FIELDS, **fields}), "toy")
    perturb(denoiser(pipeline), 2.0 if kind == "transformer" else 0.3)
    return pipeline


def base_of(model):
    return {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}


def assert_as_before(model, before):
    for name, parameter in model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, before[name]), name
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("ortho_init", ["last", None])
def test_a_pipeline_makes_the_same_picture_and_keeps_its_base(kind, ortho_init):
    pipeline = with_adapter(kind, ortho_init=ortho_init)
    model = denoiser(pipeline)
    before, expected = base_of(model), generate(pipeline, steps=8)
    with FusedGeneration(model):
        found = generate(pipeline, steps=8)
        again = generate(pipeline, steps=8)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(found, again)  # nothing drifts
    assert_as_before(model, before)
    assert torch.equal(generate(pipeline, steps=8), expected)


def test_a_layer_is_written_once_a_mask_and_runs_as_the_base():
    model = adapted(r=4, min_rank=1).eval()
    layer = model.base_model.model.to_q
    weight = layer.base_layer.weight
    times = [999, 990, 700, 650, 400, 100, 0]
    masks = [active_rank(t, 4, 1) for t in times]
    with torch.no_grad(), FusedGeneration(model):
        written = weight._version
        for t in times:
            model(X, torch.tensor(t))
        changes = sum(a != b for a, b in itertools.pairwise(masks))
        assert weight._version - written == 1 + changes
        calls = []
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
        model(X, torch.tensor(500))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_is_that_of_merging(dtype):
    model = adapted(TinyDenoiser().to(dtype)).eval()
    x, t = X.to(dtype), torch.tensor(500)
    exact = adapted(TinyDenoiser().double())
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        right = exact(X.to(dtype).double(), t)
        with FusedGeneration(model):
            found = model(x, t).double()
        with timestep_context(model, t), pytest.warns(UserWarning, match="Merging"):
            model.merge_adapter()
        merged = model(x, t).double()
    error, allowed = ((y - right).norm() / right.norm() for y in (found, merged))
    assert error <= 1.5 * allowed + 1e-15


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_weights_and_switches_act_as_ever():
    unet = tiny_unet()
    unet.add_adapter(TLoraConfig(**FIELDS), "a")
    unet.add_adapter(TLoraConfig(**{**FIELDS, "min_rank": 3, "init_seed": 2}), "b")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]), "plain")
    perturb(unet)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)

    def outputs():
        with torch.no_grad():
            return unet(x, torch.tensor(600), states).sample

    changes = [
        lambda: unet.set_adapters(["a", "b"], [0.7, -0.4]),
        lambda: unet.set_adapters("b", 2.0),
        lambda: unet.set_adapters(["plain", "a"], [0.5, 1.0]),
        unet.disable_lora,
        unet.enable_lora,
        lambda: unet.delete_adapters("a"),
    ]
    expected = [(change(), outputs())[1] for change in changes[:-1]]
    with FusedGeneration(unet):
        for change, right in zip(changes[:-1], expected, strict=True):
            change()
            torch.testing.assert_close(outputs(), right, atol=1e-5, rtol=1e-4)
        changes[-1]()
        found = outputs()
    torch.testing.assert_close(found, outputs(), atol=1e-5, rtol=1e-4)


def test_what_has_no_one_mask_runs_as_without_the_mode():
    model = adapted(r=4, min_rank=1)
    before = base_of(model)
    mixed, alike = torch.tensor([100, 900]), torch.tensor([500, 501])
    expected = model(X, mixed)
    with FusedGeneration(model):
        with torch.no_grad():
            model(X, alike)
            assert model.base_model.model.to_q.merged
            assert torch.equal(model(X, mixed), expected)
            model(X, alike)
        model(X, alike).sum().backward()  # gradients: nobody generates
        assert model.base_model.model.to_q.lora_A["default"].weight.grad.any()
        assert_as_before(model, before)
        with torch.no_grad(), timestep_context(model, 20):
            inner = model(X, mixed)
    with timestep_context(model, 20):
        torch.testing.assert_close(inner, model(X, mixed))


def test_a_change_of_the_factors_in_place_is_noticed():
    model = adapted().eval()
    t = torch.tensor(500)
    with torch.no_grad(), FusedGeneration(model):
        before = model(X, t)
        model.base_model.model.to_q.lora_B["default"].weight.mul_(3)
        found = model(X, t)
        model.base_model.model.to_out.lora_lambda["default"].weight.mul_(-2)
        assert not torch.allclose(model(X, t), found)
        found = model(X, t)
    assert not torch.allclose(found, before)
    with torch.no_grad():
        torch.testing.assert_close(found, model(X, t))


def test_pefts_own_switches_act_as_ever():
    """PeftModel.set_adapter unmerges what it finds merged, by an update that isn't there."""
    model = adapted(r=4, min_rank=1).eval()
    model.add_adapter("other", TLoraConfig(r=4, target_modules=["to_q"], init_seed=3))
    perturb(model, seed=5)
    t = torch.tensor(400)
    expected = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(X, t)
        before = base_of(model)
        with FusedGeneration(model):
            for name in ("other", "default", "default", "other"):
                if model.base_model.model.to_q.merged:
                    with pytest.warns(UserWarning, match="merged"):
                        model.set_adapter(name)
                else:
                    model.set_adapter(name)
                torch.testing.assert_close(model(X, t), expected[name])
            with model.disable_adapter():
                base = model(X, t)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(X, t), base)
    assert_as_before(model, before)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_plain_adapter_of_another_kind_beside_leaves_the_layers_masked():
    model = TinyDenoiser()
    inject_adapter_in_model(TLoraConfig(r=4, target_modules=["to_q"]), model, "toy")
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], use_dora=True), model, "dora")
    perturb(model)
    model.to_q.set_adapter(["toy", "dora"])
    with torch.no_grad():
        expected = model(X, torch.tensor(400))
        with FusedGeneration(model):
            assert torch.equal(model(X, torch.tensor(400)), expected)
            assert not model.to_q.merged


def test_an_exception_leaves_nothing_behind():
    model = adapted()
    before = base_of(model)

    def interrupted():
        with torch.no_grad(), FusedGeneration(model):
            model(X, torch.tensor(300))
            assert model.base_model.model.to_q.merged
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_as_before(model, before)
    mode = FusedGeneration(model)
    mode.enable()
    with pytest.raises(ValueError, match="enabled already"):
        mode.enable()
    mode.disable()
    mode.disable()
    assert not mode._handles


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_convolutions_are_fused_and_those_with_groups_and_attention_left_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
            self.point = nn.Conv1d(8, 8, 3, padding=1)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, timestep):
            x = self.point(self.conv(x.mT)).mT
            return self.attn(x, x, x)[0]

    config = TLoraConfig(r=4, target_modules=["conv", "point", "attn"], num_train_timesteps=1000)
    model = get_peft_model(Mixed(), config).eval()
    perturb(model)
    with torch.no_grad():
        expected = [model(X, torch.tensor(t)) for t in (900, 200)]
        with FusedGeneration(model):
            found = [model(X, torch.tensor(t)) for t in (900, 200)]
            assert not model.base_model.model.conv.merged
            assert model.base_model.model.point.merged
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_is_compiled_once(fullgraph):
    torch._dynamo.reset()
    model, counter = adapted(r=8, min_rank=1).eval(), CompileCounter()
    times = [torch.tensor(t) for t in (999, 600, 300, 10)]
    with torch.no_grad():
        expected = [model(X, t) for t in times]
        compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
        with FusedGeneration(compiled):
            found = [compiled(X, t) for t in times]
    torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def test_a_model_that_is_offloaded_as_a_whole_is_fused():
    pipeline = with_adapter("unet")
    expected = generate(pipeline)
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(pipeline.unet, hook)
    with FusedGeneration(pipeline.unet):
        found = generate(pipeline)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def cast_by_layers():
    unet = with_adapter("unet").unet
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return unet


def offloaded_in_groups():
    unet = with_adapter("unet").unet
    cpu = torch.device("cpu")
    unet.enable_group_offload(cpu, offload_type="block_level", num_blocks_per_group=1)
    return unet


def offloaded_by_layers():
    unet = with_adapter("unet").unet
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    return unet


def hooked():
    model = adapted()
    layer = model.base_model.model.to_q.base_layer
    layer.register_forward_hook(lambda *_: None)
    return model


def merged():
    model = adapted()
    with timestep_context(model, 3), pytest.warns(UserWarning, match="Merging"):
        model.merge_adapter()
    return model


def eight_bits():
    class Net(TinyDenoiser):
        def __init__(self):
            super().__init__(quantized.FEATURES)
            self.to_q = quantized.make_quanto().lin

    return get_peft_model(Net(), TLoraConfig(r=4, target_modules=["to_q"]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (TinyDenoiser, "has no denoiser with T-LoRA layers"),
        (cast_by_layers, "layerwise casting put other weights"),
        (offloaded_in_groups, "Group offloading and"),
        (offloaded_by_layers, "offloaded by itself"),
        (hooked, r"weight of base_model\.model\.to_q|weight of to_q"),
        (merged, r"\['default'\] are merged into"),
        (eight_bits, "is quantised"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(make, words):
    model = make()
    with pytest.raises(ValueError, match=words):
        FusedGeneration(model).enable()
