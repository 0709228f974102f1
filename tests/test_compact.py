"""Files without frozen factors, and loading without the initialisation that a file replaces."""

import copy
from contextlib import nullcontext

import numpy as np
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
from peft.tuners.lora import LoraModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from peft_tlora import TLoraConfig, frozen, timestep_context
from peft_tlora.checkpoint import config_from_state_dict
from peft_tlora.formats import read_peft, write_diffusers
from peft_tlora.frozen import checksum, random_factors

from .conftest import TinyDenoiser, perturb
from .test_diffusers import Pipeline, save

COMPACT = {"save_initial_factors": False, "init_seed": 3}
CONFIG = {"r": 4, "min_rank": 1, "target_modules": ["to_q", "to_out"]}


def adapted(model=None, **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(model or TinyDenoiser(), TLoraConfig(**{**CONFIG, **COMPACT, **kwargs}))
    perturb(model)
    return model.eval()


def base():
    torch.manual_seed(0)
    return TinyDenoiser()


@torch.no_grad()
def outputs(model):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    return [model(x, torch.tensor(t)) for t in (0, 400, 999)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_compact_folder_gives_the_same_outputs_bit_for_bit(
    tmp_path, low_cpu_mem_usage, is_trainable
):
    model = adapted()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {".".join(name.split(".")[-2:]) for name in names} == {
        "lora_A.weight",
        "lora_B.weight",
        "lora_lambda.weight",
        "lora_schedule.weight",
    }
    loaded = PeftModel.from_pretrained(
        base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    ).eval()
    assert_same(outputs(loaded), outputs(model))
    again = get_peft_model_state_dict(loaded)
    assert again.keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "weights alone"])
def test_a_compact_file_of_diffusers_gives_the_same_outputs(tmp_path, metadata):
    trained = Pipeline()
    for part, targets in ((trained.unet, ["to_q", "conv1"]), (trained.text_encoder, ["q_proj"])):
        part.add_adapter(TLoraConfig(r=4, target_modules=targets, ortho_init="middle", **COMPACT))
        perturb(part)
    save(trained, tmp_path, metadata)
    assert not any("_init" in name for name in load_file(next(tmp_path.iterdir())))
    loaded = Pipeline()
    loaded.load_lora_weights(str(tmp_path), adapter_name="toy")
    assert_same(loaded.outputs(), trained.outputs())
    config = loaded.unet.peft_config["toy"]
    assert (config.ortho_init, config.init_seed) == ("middle", 3)
    assert not config.save_initial_factors
    again = get_peft_model_state_dict(loaded.unet, adapter_name="toy")  # nothing is lost on the way
    assert again.keys() == get_peft_model_state_dict(trained.unet).keys()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_rebuilt_too(groups):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups))

    config = TLoraConfig(r=4, target_modules=["0"], **COMPACT)
    trained = inject_adapter_in_model(config, model())
    perturb(trained)
    state_dict = get_peft_model_state_dict(trained)
    loaded = inject_adapter_in_model(config_from_state_dict(state_dict), model())
    set_peft_model_state_dict(loaded, state_dict)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(loaded(x), trained(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32])
def test_a_file_of_another_dtype_means_what_a_full_file_of_it_means(dtype, into):
    weights = {}
    for compact in (False, True):
        model = adapted(save_initial_factors=not compact).to(dtype)
        loaded = adapted(save_initial_factors=not compact).to(into)
        set_peft_model_state_dict(loaded, get_peft_model_state_dict(model))
        layer = loaded.base_model.model.to_q
        weights[compact] = [
            *(layer.lora_A_init["default"].weight, layer.lora_B_init["default"].weight),
            *(layer.lora_lambda_init["default"].weight, layer.get_delta_weight("default")),
        ]
    assert weights[True][0].dtype == into
    assert_same(weights[True], weights[False])


def test_a_compact_file_makes_its_adapter_compact():
    model, other = adapted(), adapted(save_initial_factors=True, init_seed=4)
    state_dict = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(other, state_dict)
    assert not any("_init" in key for key in result.missing_keys)
    assert_same(outputs(other), outputs(model))
    assert get_peft_model_state_dict(other).keys() == state_dict.keys()


def test_a_full_file_is_not_taken_for_a_compact_one():
    """PEFT from 0.21 on looks for a file's names among those that the adapter would save."""
    model, other = adapted(save_initial_factors=True), adapted(init_seed=4)
    refused = pytest.raises(ValueError, match="weights for to_q come with a schedule but without")
    new = hasattr(LoraModel, "_get_adapter_state_dict")
    with refused if new else nullcontext():
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        assert_same(outputs(other), outputs(model))


def test_a_file_that_has_lost_its_frozen_factors_is_refused():
    model = adapted(save_initial_factors=True)
    state_dict = {k: v for k, v in get_peft_model_state_dict(model).items() if "_init" not in k}
    with pytest.raises(ValueError, match="weights for to_q come with a schedule but without"):
        set_peft_model_state_dict(adapted(save_initial_factors=True), state_dict)


def test_other_formats_get_the_frozen_factors(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, component="unet")
    loaded = inject_adapter_in_model(TLoraConfig(**CONFIG), base().eval())
    tensors = load_file(write_diffusers(adapter, tmp_path / "file.safetensors"))
    set_peft_model_state_dict(loaded, {k.removeprefix("unet."): v for k, v in tensors.items()})
    assert_same(outputs(loaded), outputs(model))


def test_factors_that_come_out_otherwise_are_refused(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    original = frozen.random_triplets

    def another_platform(*args, **kwargs):
        p0, lam0, q0 = original(*args, **kwargs)
        q0[0, 0] = torch.nextafter(q0[0, 0], torch.tensor(9.0))
        return p0, lam0, q0

    monkeypatch.setattr(frozen, "random_triplets", another_platform)
    with pytest.raises(ValueError, match="rebuilt for to_q from init_seed=3 differ"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_layer_of_another_name_is_refused():
    state_dict = get_peft_model_state_dict(adapted())
    renamed = {key.replace("to_q", "to_k"): tensor for key, tensor in state_dict.items()}
    model = base()
    model.to_k = model.to_q
    del model.to_q
    other = get_peft_model(model, TLoraConfig(**{**CONFIG, "target_modules": ["to_k", "to_out"]}))
    with pytest.raises(ValueError, match="rebuilt for to_k from init_seed=3 differ"):
        set_peft_model_state_dict(other, renamed)


def test_a_copy_keeps_its_frozen_factors():
    model = adapted()
    assert_same(outputs(copy.deepcopy(model)), outputs(model))


def test_a_hotswap_needs_the_same_frozen_factors(tmp_path):
    same, other = adapted(), adapted(init_seed=4)
    perturb(same, seed=5)
    same.save_pretrained(tmp_path / "same")
    other.save_pretrained(tmp_path / "other")
    model = adapted()
    with pytest.raises(ValueError, match="Configs are incompatible: for init_seed, 3 != 4"):
        hotswap_adapter(model, tmp_path / "other", "default", torch_device="cpu")
    hotswap_adapter(model, tmp_path / "same", "default", torch_device="cpu")
    assert_same(outputs(model), outputs(same))


def test_a_combination_of_compact_adapters_is_an_ordinary_adapter():
    model = adapted()
    model.add_adapter("other", TLoraConfig(**CONFIG, save_initial_factors=False, init_seed=9))
    perturb(model)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both", "cat")
    layer = model.base_model.model.to_q
    expected = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-5)
    assert model.peft_config["both"].save_initial_factors


def test_it_is_hardly_larger_than_loras_file(tmp_path):
    sizes = []
    for config in (LoraConfig(r=16), TLoraConfig(r=16, **COMPACT)):
        config.target_modules = ["proj"]
        model = inject_adapter_in_model(config, nn.ModuleDict({"proj": nn.Linear(1280, 1280)}))
        save_file(get_peft_model_state_dict(model), tmp_path / "file.safetensors")
        sizes.append((tmp_path / "file.safetensors").stat().st_size)
    assert sizes[1] / sizes[0] < 1.005


def refuse(*args, **kwargs):
    raise AssertionError("the initialisation must not run")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_runs_no_initialisation_that_it_overwrites(
    tmp_path, low_cpu_mem_usage, monkeypatch
):
    model = adapted(save_initial_factors=True)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(frozen, "random_triplets", refuse)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(outputs(loaded.eval()), outputs(model))
    loaded.set_adapter("second")
    assert_same(outputs(loaded), outputs(model))


def test_diffusers_runs_no_initialisation_that_it_overwrites(tmp_path, monkeypatch):
    trained = Pipeline()
    trained.unet.add_adapter(TLoraConfig(r=4, target_modules=["to_q"]))
    trained.text_encoder.add_adapter(TLoraConfig(r=4, target_modules=["q_proj"]))
    save(trained, tmp_path, metadata=True)
    monkeypatch.setattr(frozen, "random_triplets", refuse)
    Pipeline().load_lora_weights(str(tmp_path))


def test_an_adapter_made_for_inference_without_a_file_is_the_identity():
    model = base().eval()
    before = outputs(model)
    model = get_peft_model(model, TLoraConfig(**CONFIG, inference_mode=True))
    assert_same(outputs(model), before)


def test_the_bits_of_a_draw_depend_on_neither_threads_nor_processor():
    """The checksum is of a draw on x86 with AVX2, torch 2.13, numpy 2.4."""
    q, p = torch.empty(64, 1280), torch.empty(640, 64)
    sums = set()
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            factors = random_factors(q, p, 1, "last", seed=0, name="layer")
            sums.add(checksum(factors))
    finally:
        torch.set_num_threads(threads)
    assert sums == {7858355762248501009}
    for factor in factors:  # 16 significant bits
        assert not (factor.numpy().view(np.uint32) & 0xFF).any()


def test_a_context_masks_a_rebuilt_adapter():
    model = adapted()
    with timestep_context(model, 999):
        noisy = model.base_model.model.to_q.get_delta_weight("default")
    assert torch.linalg.matrix_rank(noisy) == 2  # one rank, trained and frozen
