"""T-LoRA through PEFT's own interface: several adapters, save and load, merge, disable, delete."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.layers.unquantized import Linear
from peft_tlora.weights.state_dict import config_from_state_dict

from .conftest import TinyDenoiser, perturb, tiny_unet

pytestmark = pytest.mark.upstream

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(6))
TIMES = [torch.tensor(t) for t in range(0, 1001, 100)] + [torch.tensor([950, 20])]
TARGETS = ["to_q", "to_out"]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]


def base_model():
    torch.manual_seed(0)
    return TinyDenoiser().eval()


def adapted(adapter_name="default", **kwargs):
    config = TLoraConfig(**{"r": 4, "min_rank": 1, "target_modules": TARGETS, **kwargs})
    model = get_peft_model(base_model(), config, adapter_name=adapter_name)
    perturb(model)
    return model.eval()


@torch.no_grad()
def outputs(model, times=TIMES):
    return [model(X, t) for t in times]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def assert_close(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("ortho", ["last", None])
def test_after_reload_the_outputs_are_equal_to_the_bit_at_every_timestep(
    tmp_path, ortho, low_cpu_mem_usage
):
    model = adapted(
        ortho_init=ortho, lora_alpha=3, rank_pattern={"to_q": 6}, rank_schedule="cosine"
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert_same(outputs(loaded), outputs(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_bf16_process_reloads_to_the_bit(tmp_path, low_cpu_mem_usage):
    def run(unet):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 4, 8, 8, generator=generator).bfloat16()
        e = torch.randn(2, 3, 16, generator=generator).bfloat16()
        with torch.no_grad():
            return [unet(x, t, e).sample for t in TIMES]

    model = get_peft_model(
        tiny_unet().bfloat16(), TLoraConfig(r=4, min_rank=1, target_modules=UNET_TARGETS)
    )
    perturb(model, 0.05)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_unet().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    if low_cpu_mem_usage:  # PEFT rounds a file to the base's dtype and widens it again
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16().float()
    dtypes = {p.dtype for n, p in loaded.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    assert_same(run(loaded), run(model))


def test_an_adapter_is_saved_without_the_others_and_with_its_biases():
    model = adapted("one", bias="all")
    alone = get_peft_model_state_dict(model, adapter_name="one")
    assert {name for name in alone if "bias" in name} >= {"base_model.model.time_proj.bias"}
    model.add_adapter("two", TLoraConfig(r=2, target_modules=TARGETS))
    beside = get_peft_model_state_dict(model, adapter_name="one")
    assert beside.keys() == alone.keys()
    assert model.peft_config["one"].peft_type == "TLORA"
    two = get_peft_model_state_dict(model, adapter_name="two")
    assert two.keys() == {name for name in alone if "lora_" in name}


def test_diffusers_save_and_load_of_an_injected_adapter():
    unet = tiny_unet()
    unet.add_adapter(TLoraConfig(r=4, min_rank=1, target_modules=UNET_TARGETS))
    perturb(unet)
    weights = get_peft_model_state_dict(unet)
    other = tiny_unet()
    inject_adapter_in_model(
        TLoraConfig(r=4, min_rank=1, target_modules=UNET_TARGETS), other, adapter_name="mine"
    )
    result = set_peft_model_state_dict(other, weights, adapter_name="mine")
    assert not result.unexpected_keys
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    with torch.no_grad():
        for t in TIMES:
            assert torch.equal(other(x, t, e).sample, unet(x, t, e).sample)


def test_the_names_in_a_file_keep_loras_and_have_its_prefix():
    weights = get_peft_model_state_dict(adapted())
    names = {name.removeprefix("base_model.model.to_q.") for name in weights if "to_q" in name}
    assert names == {
        "lora_A.weight",
        "lora_B.weight",
        "lora_lambda.weight",
        "lora_schedule.weight",
    }
    full = get_peft_model_state_dict(adapted(save_initial_factors=True))
    assert {name.removeprefix("base_model.model.to_q.") for name in full if "to_q" in name} == {
        *names,
        "lora_A_init.weight",
        "lora_B_init.weight",
        "lora_lambda_init.weight",
    }
    vanilla = get_peft_model_state_dict(adapted(ortho_init=None))
    names = {name.removeprefix("base_model.model.to_q.") for name in vanilla if "to_q" in name}
    assert names == {"lora_A.weight", "lora_B.weight", "lora_schedule.weight"}


@pytest.mark.parametrize(
    "fields",
    [
        {"min_rank": 0.25},
        {"min_rank": 2, "rank_schedule": "cosine", "schedule_exponent": 1 / 3},
        {"num_train_timesteps": 2000.0, "timestep_reversed": True},
        {"rank_schedule": "constant"},
        {"ortho_init": None},
        {"rank_pattern": {"to_q": 6}, "alpha_pattern": {"to_out": 5}, "use_rslora": True},
    ],
)
def test_the_weights_alone_tell_the_configuration(fields):
    model = adapted(**fields)
    weights = {
        name.removeprefix("base_model.model."): weight
        for name, weight in get_peft_model_state_dict(model).items()
    }
    config = config_from_state_dict(weights)
    for name, value in fields.items():
        if "pattern" not in name:
            assert getattr(config, name) == value, name
    other = inject_adapter_in_model(config, base_model(), adapter_name="default")
    set_peft_model_state_dict(other, weights)
    assert_same(outputs(other.eval()), outputs(model))


def test_the_table_of_denoisers_ends_up_in_the_file():
    model = get_peft_model(base_model(), TLoraConfig(r=4, target_modules=TARGETS))
    config = config_from_state_dict(get_peft_model_state_dict(model))
    assert (config.num_train_timesteps, config.timestep_reversed) == (1000.0, False)
    assert config.timestep_type == "linear"


@pytest.mark.parametrize("timestep_type", ["log_sigma", None])
def test_a_timestep_type_without_a_range_ends_up_in_the_file(timestep_type):
    unet = tiny_unet()  # whose scheduler decides
    unet.add_adapter(TLoraConfig(target_modules=["to_q"], timestep_type=timestep_type))
    config = config_from_state_dict(get_peft_model_state_dict(unet))
    assert (config.num_train_timesteps, config.timestep_reversed) == (None, None)
    assert config.timestep_type == timestep_type


def test_weights_without_an_adapter_raise():
    with pytest.raises(ValueError, match="holds no T-LoRA adapter"):
        config_from_state_dict({"to_q.lora_A.weight": torch.zeros(2, 2)})


def test_the_weights_schedule_wins_over_a_config_that_was_typed_differently():
    model = adapted(min_rank=1)
    weights = get_peft_model_state_dict(model)
    other = get_peft_model(base_model(), TLoraConfig(r=4, min_rank=3, target_modules=TARGETS))
    with pytest.warns(UserWarning, match="The weights' own schedule is used") as caught:
        set_peft_model_state_dict(other, weights)
    assert len(caught) == 1
    assert_same(outputs(other.eval()), outputs(model))


def test_training_goes_on_after_a_reload(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    for each in (model, loaded):
        each.train()
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        for t in (100, 900, 500):
            optimizer.zero_grad()
            each(X, torch.tensor(t)).square().sum().backward()
            optimizer.step()
    assert_same(outputs(loaded), outputs(model))


# ---------------------------------------------------------------------------- several adapters


def test_adapters_with_different_schedules_act_together():
    one = adapted("one", min_rank=1)
    two_config = TLoraConfig(
        r=6, min_rank=5, target_modules=["to_q"], rank_schedule="cosine", ortho_init=None
    )
    together = copy.deepcopy(one)
    together.add_adapter("two", two_config)
    for parameter in together.base_model.model.to_q.lora_B["two"].parameters():
        parameter.data += 0.1
    together.set_adapter("two")
    only_two = outputs(together)
    together.set_adapter("one")
    assert_same(outputs(together), outputs(one))
    together.base_model.set_adapter(["one", "two"])
    layer = together.base_model.model.to_q
    for t in (torch.tensor(1000), torch.tensor(0)):
        with timestep_context(together, t), torch.no_grad():
            expected = layer.base_layer(X) + sum(
                nn.functional.linear(X, layer.get_delta_weight(name)) for name in ("one", "two")
            )
            torch.testing.assert_close(layer(X), expected, atol=1e-5, rtol=1e-5)
    assert not all(torch.equal(a, b) for a, b in zip(only_two, outputs(together), strict=True))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("first", ["lora", "tlora"])
def test_plain_lora_beside_t_lora_in_either_order(first):
    """Plain LoRA first: PEFT puts the second adapter into the plain layer that is already there."""
    torch.manual_seed(0)
    configs = {
        "lora": LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False),
        "tlora": TLoraConfig(r=4, min_rank=1, target_modules=TARGETS, init_lora_weights=False),
    }
    names = [first, *(name for name in configs if name != first)]
    denoiser = base_model()
    for name in names:
        inject_adapter_in_model(configs[name], denoiser, adapter_name=name)
    denoiser.to_q.set_adapter(["lora", "tlora"])
    with torch.no_grad():
        for t, rank in ((1000, 1), (0, 4)):
            with timestep_context(denoiser, t):
                layer = denoiser.to_q
                plain = layer.lora_B["lora"](layer.lora_A["lora"](X)) * layer.scaling["lora"]
                masked = nn.functional.linear(X, layer.get_delta_weight("tlora"))
                expected = layer.base_layer(X) + plain + masked
                torch.testing.assert_close(layer(X), expected, atol=1e-5, rtol=1e-5)
                mask = layer.lora_variant["tlora"].ranks.of_context(layer)
                assert mask == rank


def test_disable_and_delete_adapters():
    model = adapted("one")
    model.add_adapter("two", TLoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    base = outputs(base_model())
    with model.disable_adapter():
        assert_same(outputs(model), base)
    one = outputs(model)
    model.delete_adapter("two")
    assert not [name for name in model.state_dict() if ".two" in name]
    assert_same(outputs(model), one)
    assert "two" not in model.base_model.model.to_q.lora_variant


def test_the_active_adapter_alone_is_trainable():
    model = adapted("one")
    model.add_adapter("two", TLoraConfig(r=2, target_modules=TARGETS))
    for active in ("two", "one"):
        model.set_adapter(active)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(f".{active}" in name for name in trainable)
        assert any("lora_lambda" in name for name in trainable)


def test_inference_mode_trains_nothing():
    model = get_peft_model(
        base_model(), TLoraConfig(r=4, target_modules=TARGETS, inference_mode=True)
    )
    assert not any(p.requires_grad for p in model.parameters())


def test_modules_to_save_and_bias_are_kept(tmp_path):
    config = TLoraConfig(r=4, target_modules=["to_q"], modules_to_save=["to_out"], bias="lora_only")
    model = get_peft_model(base_model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert_same(outputs(loaded.eval()), outputs(model.eval()))


def test_the_conversion_to_plain_lora_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is not"):
        model.save_pretrained(
            tmp_path / "converted",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    assert list(model.peft_config) == ["default"]


# --------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("t", [None, 1000, 300])
def test_merging_fixes_the_mask_of_the_context_and_warns_once(t, safe_merge):
    model = adapted()
    with torch.no_grad():
        expected = model(X, torch.tensor(0 if t is None else t))
        delta_at_zero = model(X, torch.tensor(0))
    context = nullcontext() if t is None else timestep_context(model, t)
    with context, pytest.warns(UserWarning, match="adapter fixes its mask") as caught:
        model.merge_adapter(safe_merge=safe_merge)
    assert len(caught) == 1
    # the merged weights are those of one timestep, whatever the model is called with
    weight = model.base_model.model.to_q.get_base_layer().weight.clone()
    model.unmerge_adapter()
    assert not torch.equal(weight, model.base_model.model.to_q.get_base_layer().weight)
    with torch.no_grad():
        torch.testing.assert_close(model(X, torch.tensor(0)), delta_at_zero, atol=1e-5, rtol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with timestep_context(model, 0 if t is None else t):
                model.merge_adapter(safe_merge=safe_merge)
        merged = model(X, torch.tensor(0 if t is None else t))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_unmerging_outside_of_the_context_restores_the_base_weight():
    model = adapted()
    before = model.base_model.model.to_q.get_base_layer().weight.clone()
    with pytest.warns(UserWarning, match="fixes its mask"), timestep_context(model, 1000):
        model.merge_adapter()
    model.unmerge_adapter()
    after = model.base_model.model.to_q.get_base_layer().weight
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_merge_and_unload_returns_the_plain_model():
    model = adapted()
    expected = outputs(model, [torch.tensor(1000)])
    with pytest.warns(UserWarning, match="fixes its mask"), timestep_context(model, 1000):
        merged = model.merge_and_unload()
    assert type(merged.to_q) is nn.Linear
    assert_close(outputs(merged, [torch.tensor(1000)]), expected, atol=1e-5, rtol=1e-5)


def test_merging_a_model_without_time_does_not_warn():
    model = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(model, TLoraConfig(r=4, target_modules=["0"]))
    perturb(model)
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected, atol=1e-5, rtol=1e-5)


def test_merging_several_timesteps_at_once_raises():
    model = adapted()
    context = timestep_context(model, torch.tensor([0, 1000]))
    with context, pytest.raises(ValueError, match="one mask for all samples"):
        model.merge_adapter()


@pytest.mark.parametrize("t", [1000, 400])
def test_convolutions_merge(t):
    unet = tiny_unet()
    unet = get_peft_model(unet, TLoraConfig(r=4, min_rank=1, target_modules=UNET_TARGETS))
    perturb(unet)
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = unet(x, torch.tensor(t), e).sample
        with pytest.warns(UserWarning, match="fixes its mask"), timestep_context(unet, t):
            merged = unet.merge_and_unload()
        found = merged(x, torch.tensor(t), e).sample
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------- refused, converted, exchanged, extended


def test_target_parameters_and_mixed_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"target_parameters=.* is not supported with T-LoRA"):
        TLoraConfig(target_parameters=["to_q.weight"])
    config = TLoraConfig(r=4, target_modules=TARGETS)
    with pytest.raises(ValueError, match="'TLORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base_model(), config, mixed=True)


def test_an_unknown_bias_is_refused_by_peft():
    with pytest.raises(NotImplementedError, match="Requested bias: some, is not implemented"):
        get_peft_model(base_model(), TLoraConfig(r=4, target_modules=TARGETS, bias="some"))


@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("compiled_scaling", [False, True])
def test_hotswap_between_adapters_of_one_schedule(tmp_path, ortho, compiled_scaling):
    for name, seed in (("one", 1), ("two", 2)):
        model = get_peft_model(
            base_model(),
            TLoraConfig(r=4, min_rank=1, lora_alpha=seed, target_modules=TARGETS, ortho_init=ortho),
        )
        perturb(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    one, two = (
        PeftModel.from_pretrained(base_model(), tmp_path / name).eval() for name in ("one", "two")
    )
    if compiled_scaling:
        prepare_model_for_compiled_hotswap(one)
    assert not torch.allclose(outputs(one)[0], outputs(two)[0])
    hotswap_adapter(one, tmp_path / "two", adapter_name="default", torch_device="cpu")
    assert_close(outputs(one), outputs(two), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "other", [{"r": 8}, {"min_rank": 2}, {"rank_schedule": "cosine"}, {"ortho_init": None}]
)
def test_hotswap_between_schedules_is_refused_before_anything_changes(tmp_path, other):
    adapted(**other).save_pretrained(tmp_path)
    model = adapted()
    before = outputs(model)
    with pytest.raises(ValueError, match=f"Configs are incompatible: for {next(iter(other))}"):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    assert_same(outputs(model), before)


@pytest.mark.parametrize("ortho", ["last", None])
def test_factors_padded_for_a_hotswap_compute_the_same(tmp_path, ortho):
    adapted(ortho_init=ortho, lora_alpha=3).save_pretrained(tmp_path)
    model = adapted(ortho_init=ortho)
    before = outputs(model)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert len(model.base_model.model.to_q.lora_A["default"].weight) == 6
    assert_same(outputs(model), before)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    assert_same(outputs(model), outputs(adapted(ortho_init=ortho, lora_alpha=3)))


def test_a_custom_module_computes_what_its_class_says_and_is_named():
    class Own(nn.Linear):
        pass

    class OwnLora(lora.Linear):
        pass

    model = base_model()
    model.to_q = Own(8, 8)
    config = TLoraConfig(r=4, target_modules=TARGETS)
    config._register_custom_module({Own: OwnLora})
    with pytest.warns(UserWarning, match="custom modules.* have no T-LoRA mask: to_q"):
        model = get_peft_model(model, config)
    assert type(model.base_model.model.to_q) is OwnLora
    assert type(model.base_model.model.to_out) is Linear


# -------------------------------------------------------------------- which layers are adapted


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "all-linear"}, {"time_proj", "to_q", "to_out"}),
        ({"target_modules": ["to_q", "to_out"], "exclude_modules": ["to_out"]}, {"to_q"}),
        ({"target_modules": r"to_.*", "exclude_modules": r".*_out"}, {"to_q"}),
        ({"target_modules": ["to_q"], "modules_to_save": ["to_out"]}, {"to_q"}),
    ],
)
def test_targets_are_chosen_as_by_lora(fields, expected):
    model = get_peft_model(base_model(), TLoraConfig(r=1, **fields)).base_model.model
    assert {name for name, module in model.named_modules() if type(module) is Linear} == expected


def test_layers_to_transform_and_patterns():
    blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(3)])
    model = nn.ModuleDict({"inner": nn.ModuleDict({"blocks": blocks})})
    config = TLoraConfig(
        r=4,
        target_modules=["q"],
        layers_to_transform=[0, 2],
        layers_pattern="blocks",
        rank_pattern={r"blocks\.2\.q": 6},
        alpha_pattern={r"blocks\.2\.q": 3},
    )
    inject_adapter_in_model(config, model)
    kinds = [type(block["q"]) for block in blocks]
    assert kinds == [Linear, nn.Linear, Linear]
    layer = blocks[2]["q"]
    assert (layer.r["default"], layer.scaling["default"]) == (6, 0.5)
    assert layer.lora_variant["default"].ranks.schedule.r == 6


def test_a_state_dict_under_a_wrappers_prefix_loads():
    class Wrapper(nn.Module):  # as DistributedDataParallel names what it holds
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = adapted()
    state = get_peft_model_state_dict(model, state_dict=model.state_dict())
    wrapped = {
        f"module.{k}": v
        for k, v in get_peft_model(
            base_model(), TLoraConfig(r=4, min_rank=1, target_modules=TARGETS)
        )
        .state_dict()
        .items()
    }
    assert Wrapper(model).state_dict().keys() == wrapped.keys()
    stripped = {k.removeprefix("module."): v for k, v in Wrapper(model).state_dict().items()}
    other = get_peft_model(base_model(), TLoraConfig(r=4, min_rank=1, target_modules=TARGETS))
    assert not other.load_state_dict(stripped).missing_keys
    assert_same(outputs(other.eval()), outputs(model))
    assert all(torch.equal(get_peft_model_state_dict(other)[k], v) for k, v in state.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_new_adapter_is_where_it_is_wanted_and_draws_no_number(low_cpu_mem_usage):
    """PEFT's values of projections that begin at zero are not drawn, and none is left out."""
    base = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(5, 4, 3)).bfloat16()
    config = TLoraConfig(r=2, target_modules=["0", "1"], init_seed=0)
    before = torch.get_rng_state()
    model = get_peft_model(
        base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(torch.get_rng_state(), before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6
    for parameter in trained.values():
        assert parameter.dtype == (torch.float32 if low_cpu_mem_usage else torch.bfloat16)
        assert parameter.is_meta == low_cpu_mem_usage
        assert low_cpu_mem_usage or not parameter.any()
