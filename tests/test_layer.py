import warnings

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora.layer import Embedding
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.layers.dispatch import become_tlora_layer

from .conftest import TinyDenoiser, perturb, tiny_unet

ALL = ["to_q", "to_out.0", "conv1", "conv_in", "time_emb_proj"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unet_inputs(dtype):
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 3, 16))]
    return draw[0].to(dtype), torch.tensor([900, 100]), draw[1].to(dtype)


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ortho", ["last", "middle", "principal", None])
def test_the_update_is_exactly_zero_before_and_after_save_and_load(tmp_path, ortho, dtype, upcast):
    inputs = unet_inputs(dtype)
    with torch.no_grad():
        base = tiny_unet().to(dtype)(*inputs).sample
        config = TLoraConfig(r=4, lora_alpha=3, target_modules=ALL, ortho_init=ortho)
        model = get_peft_model(tiny_unet().to(dtype), config, autocast_adapter_dtype=upcast)
        assert torch.equal(model(*inputs).sample, base)
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                tiny_unet().to(dtype),
                tmp_path,
                autocast_adapter_dtype=upcast,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            assert torch.equal(loaded(*inputs).sample, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_update_is_exactly_zero_in_a_diffusers_script(dtype):
    """Scripts cast the model first, add the adapter and then upcast what is trainable."""
    inputs = unet_inputs(dtype)
    with torch.no_grad():
        base = tiny_unet().to(dtype)(*inputs).sample
        unet = tiny_unet().to(dtype)
        unet.requires_grad_(False)
        unet.add_adapter(TLoraConfig(r=4, target_modules=ALL, init_lora_weights="gaussian"))
        assert torch.equal(unet(*inputs).sample, base)
        cast_training_params(unet, dtype=torch.float32)
        assert torch.equal(unet(*inputs).sample, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fp32_file_loads_into_a_low_precision_base_with_a_zero_update(tmp_path, dtype):
    """Rounding only the frozen factors would leave an update."""
    get_peft_model(tiny_unet(), TLoraConfig(r=4, target_modules=ALL)).save_pretrained(tmp_path)
    inputs = unet_inputs(dtype)
    with torch.no_grad():
        base = tiny_unet().to(dtype)(*inputs).sample
        for low_cpu_mem_usage in (False, True):
            for upcast in (False, True):
                loaded = PeftModel.from_pretrained(
                    tiny_unet().to(dtype),
                    tmp_path,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    autocast_adapter_dtype=upcast,
                )
                assert torch.equal(loaded(*inputs).sample, base)


def test_gaussian_does_not_switch_the_orthogonal_initialisation_off(denoiser):
    config = TLoraConfig(r=4, target_modules=["to_q"], init_lora_weights="gaussian")
    layer = get_peft_model(denoiser, config).base_model.model.to_q
    q = layer.start("default").q0
    torch.testing.assert_close(q @ q.T, torch.eye(4), atol=5e-3, rtol=0)
    assert not layer.lora_A["default"].weight.any()


def test_vanilla_is_initialised_as_init_lora_weights_says(denoiser):
    config = TLoraConfig(
        r=4, target_modules=["to_q"], ortho_init=None, init_lora_weights="gaussian"
    )
    torch.manual_seed(3)
    layer = get_peft_model(denoiser, config).base_model.model.to_q
    torch.manual_seed(3)
    plain_config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights="gaussian")
    plain = get_peft_model(TinyDenoiser(), plain_config).base_model.model.to_q
    assert (layer.lora_B["default"].weight == 0).all()
    stds = [float(each.lora_A["default"].weight.detach().std()) for each in (layer, plain)]
    assert stds[0] == pytest.approx(stds[1], rel=0.5)
    assert not layer.lora_lambda


def test_init_lora_weights_false_is_not_the_identity_and_differs_between_adapters(denoiser):
    x, t = torch.randn(1, 3, 8), torch.tensor(0)
    base = denoiser(x, t)
    config = TLoraConfig(r=4, target_modules=["to_q", "to_out"], init_lora_weights=False)
    model = get_peft_model(denoiser, config, adapter_name="one")
    model.add_adapter("two", config)
    one = model(x, t)
    model.set_adapter("two")
    two = model(x, t)
    assert not torch.allclose(one, base, atol=1e-3)
    assert not torch.allclose(two, base, atol=1e-3)
    assert not torch.allclose(one, two, atol=1e-3)


def starts(model, *names):
    layers = [model.get_submodule(name) for name in names]
    return [factor for layer in layers for factor in layer.start("default")]


def test_the_start_depends_on_seed_name_and_shape_alone():
    class Reordered(TinyDenoiser):
        def __init__(self):
            super().__init__()
            self.to_q = self._modules.pop("to_q")  # now registered last

    found = []
    for cls, seed in ((TinyDenoiser, 0), (Reordered, 0), (TinyDenoiser, 5)):
        torch.rand(len(found))
        config = TLoraConfig(r=4, target_modules=["to_q", "to_out"], init_seed=seed)
        model = get_peft_model(cls(), config).base_model.model
        found.append(starts(model, "to_q", "to_out"))
    for one, two, other in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, other)
    assert not torch.equal(found[0][0], found[0][3])  # of another layer


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("wrap", ["nested", "compiled", "ddp", "checkpoint", "denoiser"])
def test_the_start_does_not_depend_on_what_wraps_the_model(wrap):
    class Training(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.unet = model

    def unet_of(model):
        return next(m for m in model.modules() if type(m).__name__ == "UNet2DConditionModel")

    config = TLoraConfig(r=4, target_modules=["attn1.to_q"])
    plain = inject_adapter_in_model(config, tiny_unet())
    unet = tiny_unet()
    if wrap == "nested":
        wrapped = get_peft_model(unet, LoraConfig(target_modules=["conv_in"]))
    elif wrap == "compiled":
        wrapped = torch.compile(unet)
    elif wrap == "ddp":  # as it names what it wraps
        wrapped = nn.ModuleDict({"module": unet})
    elif wrap == "checkpoint":
        wrapped = unet
        blocks = unet.down_blocks[0].attentions[0].transformer_blocks
        blocks[0] = checkpoint_wrapper(blocks[0])
    else:
        wrapped = Training(unet)
    inject_adapter_in_model(TLoraConfig(r=4, target_modules=["attn1.to_q"]), wrapped)
    layers = [
        [m.start("default") for m in model.modules() if hasattr(m, "lora_lambda")]
        for model in (plain, unet_of(wrapped))
    ]
    assert len(layers[0]) == len(layers[1]) > 0
    for one, two in zip(*layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_a_seed_torchs_generator_draws_one_and_the_config_has_it():
    configs = [TLoraConfig(r=4, target_modules=["to_q"], init_seed=None) for _ in range(3)]
    found = []
    for config, seed in zip(configs, (1, 1, 2), strict=True):
        torch.manual_seed(seed)
        found.append(starts(get_peft_model(TinyDenoiser(), config).base_model.model, "to_q")[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert configs[0].init_seed == configs[1].init_seed != configs[2].init_seed


def test_the_weights_own_triplets_can_be_the_source(denoiser):
    weight = denoiser.to_q.weight.detach().clone()
    config = TLoraConfig(
        r=8, target_modules=["to_q"], ortho_init="principal", ortho_source="weight"
    )
    layer = get_peft_model(denoiser, config).base_model.model.to_q
    q, p, lam = layer.start("default")
    torch.testing.assert_close((p * lam[:, 0]) @ q, weight, atol=5e-3, rtol=0)


def test_the_frozen_factors_are_never_trainable(unet):
    unet.add_adapter(TLoraConfig(r=4, target_modules=ALL))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    unet.train()
    unet.requires_grad_(True)
    frozen = {name: b.clone() for name, b in unet.named_buffers() if "_init" in name}
    assert frozen
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1.0)
    x, t, e = unet_inputs(torch.float32)
    unet(x, t, e).sample.square().mean().backward()
    optimizer.step()
    for name, buffer in unet.named_buffers():
        assert not buffer.requires_grad, name
        if name in frozen:
            assert torch.equal(buffer, frozen[name]), name
    assert not any("_init" in name for name, _ in unet.named_parameters())


@pytest.mark.parametrize("ortho", ["last", None])
def test_with_zero_active_ranks_every_parameter_still_gets_a_gradient(denoiser, ortho):
    config = TLoraConfig(r=4, min_rank=0, target_modules=["to_q", "to_out"], ortho_init=ortho)
    model = get_peft_model(denoiser, config)
    perturb(model)
    x = torch.randn(2, 3, 8)
    with model.disable_adapter():
        base = model(x, torch.tensor(1000))
    output = model(x, torch.tensor(1000))
    torch.testing.assert_close(output, base, rtol=0, atol=0)
    output.sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_inactive_ranks_get_no_gradient(denoiser):
    config = TLoraConfig(r=4, min_rank=2, target_modules=["to_q"])
    model = get_peft_model(denoiser, config)
    perturb(model)
    model(torch.randn(2, 3, 8), torch.tensor(1000)).sum().backward()
    layer = model.base_model.model.to_q
    moved = (layer.lora_lambda["default"].weight.grad != 0).flatten()
    assert moved.tolist() == [True, True, False, False]
    assert (layer.lora_A["default"].weight.grad != 0).any(1).tolist() == [True, True, False, False]


def test_a_rank_above_the_layers_size_warns_once_and_the_surplus_learns():
    model = nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 20), nn.Linear(20, 20))
    config = TLoraConfig(r=8, min_rank=8, target_modules=["0", "1", "2"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(model, config)
    texts = [str(w.message) for w in caught]
    assert [text for text in texts if "r exceeds" in text] == [
        "r exceeds the smaller dimension of 2 layers: 0, 1. Their surplus ranks start with "
        "singular value 0."
    ]
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.shape == (8, 10)
    assert layer.lora_B["default"].weight.shape == (3, 8)
    x = torch.randn(4, 10)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    assert (layer.lora_lambda["default"].weight.grad[3:] != 0).all()


def test_embeddings_get_plain_lora_at_full_rank():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    model = get_peft_model(model, TLoraConfig(r=4, min_rank=1, target_modules=["0", "1"]))
    assert type(model.base_model.model[0]) is Embedding
    perturb(model)
    ids = torch.arange(10)
    embedding = model.base_model.model[0]
    with timestep_context(model, 1000):
        masked = embedding(ids)
    torch.testing.assert_close(masked, embedding(ids), rtol=0, atol=0)


def test_a_layer_of_an_unknown_class_raises_by_name():
    class NewLinear(lora.Linear):
        """As a later version of PEFT may have it."""

    plain = NewLinear(nn.Linear(8, 8), "default", config=LoraConfig(), r=4)
    with pytest.raises(TypeError, match=r"NewLinear at to_q; leave it out with exclude_modules"):
        become_tlora_layer(plain, "to_q")


def test_rslora_patterns_and_min_rank_follow_each_layer(denoiser):
    config = TLoraConfig(
        r=4,
        lora_alpha=2,
        use_rslora=True,
        rank_pattern={"to_q": 6},
        alpha_pattern={"to_q": 3},
        target_modules=["to_q", "to_out"],
    )
    model = get_peft_model(denoiser, config).base_model.model
    assert model.to_q.scaling["default"] == pytest.approx(3 / 6**0.5)
    assert model.to_out.scaling["default"] == pytest.approx(2 / 4**0.5)
    assert model.to_q.lora_variant["default"].ranks.schedule.r_min == 3
    assert model.to_out.lora_variant["default"].ranks.schedule.r_min == 2


def test_dropout_acts_in_training_only(denoiser):
    config = TLoraConfig(r=4, lora_dropout=0.5, target_modules=["to_q"])
    model = get_peft_model(denoiser, config)
    perturb(model)
    x, t = torch.randn(2, 3, 8), torch.tensor(10)
    assert torch.equal(model.eval()(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_a_layer_prints_as_pefts(denoiser):
    model = get_peft_model(denoiser, TLoraConfig(r=4, target_modules=["to_q"]))
    assert repr(model.base_model.model.to_q).startswith("lora.Linear(")


def test_autocast_runs_in_low_precision(denoiser):
    model = get_peft_model(denoiser, TLoraConfig(r=4, target_modules=["to_q"]))
    perturb(model)
    x, t = torch.randn(2, 3, 8), torch.tensor(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, t)
    torch.testing.assert_close(low.float(), model(x, t), atol=0.1, rtol=0.1)
