"""The frozen start of the factors: made of a seed again and again, or held by the file."""

import copy
from dataclasses import replace

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
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.formats import read_adapter, write_diffusers
from peft_tlora.layers import initialization
from peft_tlora.schedule import RankSchedule
from peft_tlora.timestep.range import TimestepRange
from peft_tlora.weights import start as frozen
from peft_tlora.weights.encoding import Encoded, decode_schedule, encode_schedule
from peft_tlora.weights.start import draw_start, fingerprint, name_key, new_start, rebuild
from peft_tlora.weights.state_dict import config_from_state_dict

from .conftest import TinyDenoiser, perturb
from .tiny.pipelines import LoaderPipeline, save_parts

pytestmark = pytest.mark.upstream

CONFIG = {"r": 4, "min_rank": 1, "target_modules": ["to_q", "to_out"]}
FULL = {"save_initial_factors": True}
WEIGHT = {"ortho_source": "weight"}
TRAINED = {"lora_A.weight", "lora_B.weight", "lora_lambda.weight", "lora_schedule.weight"}


def base():
    torch.manual_seed(0)
    return TinyDenoiser()


def adapted(**kwargs):
    model = get_peft_model(base(), TLoraConfig(**{**CONFIG, "init_seed": 3, **kwargs}))
    perturb(model)
    return model.eval()


@torch.no_grad()
def outputs(model):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    return [model(x, torch.tensor(t)) for t in (0, 400, 999)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def parts(tensors):
    return {".".join(name.split(".")[-2:]) for name in tensors}


@pytest.mark.parametrize("fields", [{}, FULL, WEIGHT], ids=["seed", "full", "weight"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_folder_gives_the_same_outputs_bit_for_bit(
    tmp_path, low_cpu_mem_usage, is_trainable, fields
):
    model = adapted(**fields)
    model.save_pretrained(tmp_path)
    held = {f"lora_{x}_init.weight" for x in ("A", "B", "lambda")} if fields else set()
    assert parts(load_file(tmp_path / "adapter_model.safetensors")) == TRAINED | held
    loaded = PeftModel.from_pretrained(
        base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    ).eval()
    assert_same(outputs(loaded), outputs(model))
    again = get_peft_model_state_dict(loaded)
    assert again.keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("fields", [{}, FULL, WEIGHT], ids=["seed", "full", "weight"])
@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "weights alone"])
def test_a_file_of_diffusers_gives_the_same_outputs(tmp_path, metadata, fields):
    trained = LoaderPipeline()
    for part, targets in ((trained.unet, ["to_q", "conv1"]), (trained.text_encoder, ["q_proj"])):
        config = TLoraConfig(
            r=4, target_modules=targets, ortho_init="middle", init_seed=3, **fields
        )
        part.add_adapter(config)
        perturb(part)
    save_parts(trained, tmp_path, metadata)
    held = [name for name in load_file(next(tmp_path.iterdir())) if "_init" in name]
    assert bool(held) == bool(fields)
    loaded = LoaderPipeline()
    loaded.load_lora_weights(str(tmp_path), adapter_name="toy")
    assert_same(loaded.outputs(), trained.outputs())
    if "ortho_source" not in fields:
        config = loaded.unet.peft_config["toy"]
        assert (config.ortho_init, config.init_seed) == ("middle", 3)
    again = get_peft_model_state_dict(loaded.unet, adapter_name="toy")  # nothing is lost on the way
    assert again.keys() == get_peft_model_state_dict(trained.unet).keys()


def test_a_text_encoder_follows_its_file_where_the_metadata_says_otherwise(tmp_path):
    """transformers puts a file's tensors past the layers, and the config's seed would win."""
    trained = LoaderPipeline()
    config = TLoraConfig(r=4, target_modules=["q_proj"], init_seed=3)
    trained.text_encoder.add_adapter(config)
    trained.unet.add_adapter(TLoraConfig(r=4, target_modules=["to_q"], init_seed=3))
    perturb(trained.text_encoder)
    config.init_seed = trained.unet.peft_config["default"].init_seed = 0
    save_parts(trained, tmp_path, metadata=True)
    loaded = LoaderPipeline()
    loaded.load_lora_weights(str(tmp_path))
    assert_same(loaded.outputs(), trained.outputs())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_rebuilt_too(groups):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups))

    trained = inject_adapter_in_model(TLoraConfig(r=4, target_modules=["0"], init_seed=3), model())
    perturb(trained)
    state_dict = get_peft_model_state_dict(trained)
    loaded = inject_adapter_in_model(config_from_state_dict(state_dict), model())
    set_peft_model_state_dict(loaded, state_dict)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(loaded(x), trained(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_start_is_the_same_in_every_dtype_and_after_every_cast(dtype):
    wanted = adapted().base_model.model.to_q.start("default")
    made = get_peft_model(
        base().to(dtype), TLoraConfig(**CONFIG, init_seed=3), autocast_adapter_dtype=False
    )
    cast = adapted().to(dtype).float()
    eight = adapted().to(torch.float8_e4m3fn)
    for model in (made, cast, eight):
        for factor, other in zip(wanted, model.base_model.model.to_q.start("default"), strict=True):
            assert torch.equal(factor, other.float())


@pytest.mark.parametrize("fields", [{}, FULL, WEIGHT], ids=["seed", "full", "weight"])
def test_an_adapter_follows_the_start_of_a_file_whatever_its_own(fields):
    model = adapted(**fields)
    state_dict = get_peft_model_state_dict(model)
    for own in ({}, FULL, {"init_seed": 4}, {"ortho_init": "principal"}, WEIGHT):
        other = adapted(**own)
        result = set_peft_model_state_dict(other, state_dict)
        assert not result.unexpected_keys
        assert_same(outputs(other), outputs(model))
        # and what it saves is as whole as what it has read
        third = adapted(init_seed=9)
        set_peft_model_state_dict(third, get_peft_model_state_dict(other))
        assert_same(outputs(third), outputs(model))


@pytest.mark.parametrize("own", [{}, WEIGHT, {**WEIGHT, "inference_mode": True}])
@pytest.mark.parametrize("left_out", [["_init"], ["_init", "schedule"], ["lambda_init"]])
def test_a_file_that_has_lost_the_start_that_it_should_hold_is_refused(own, left_out):
    state_dict = {
        name: tensor
        for name, tensor in get_peft_model_state_dict(adapted(**WEIGHT)).items()
        if not any(part in name for part in left_out)
    }
    other = adapted(**own)
    if "schedule" in left_out and not own.get("inference_mode"):
        set_peft_model_state_dict(other, state_dict)  # that of an adapter of the same config
        return
    with pytest.raises(ValueError, match="weights for to_q come without the start"):
        set_peft_model_state_dict(other, state_dict)


def test_other_formats_get_the_start(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, component="unet")
    loaded = inject_adapter_in_model(TLoraConfig(**CONFIG), base().eval())
    tensors = load_file(write_diffusers(adapter, tmp_path / "file.safetensors"))
    assert parts(tensors) == TRAINED
    set_peft_model_state_dict(loaded, {k.removeprefix("unet."): v for k, v in tensors.items()})
    assert_same(outputs(loaded), outputs(model))


def test_another_rounding_of_the_last_digit_is_the_same_start(tmp_path, monkeypatch):
    adapted(init_seed=3).save_pretrained(tmp_path)
    original = frozen.random_triplets

    def another_lapack(*args, **kwargs):
        return [factor * (1 + 2**-8) for factor in original(*args, **kwargs)]

    monkeypatch.setattr(frozen, "random_triplets", another_lapack)
    PeftModel.from_pretrained(base(), tmp_path)


def test_other_numbers_are_another_start(tmp_path, monkeypatch):
    adapted(init_seed=3).save_pretrained(tmp_path)
    config = TLoraConfig(**CONFIG, init_seed=0)
    model = get_peft_model(base(), config)
    original = frozen.random_triplets

    def another_version(*args, **kwargs):
        return original(*args, **{**kwargs, "name": kwargs["name"] + "!"})

    monkeypatch.setattr(frozen, "random_triplets", another_version)
    with pytest.raises(ValueError, match="start of the factors made for to_q from init_seed=3"):
        model.load_adapter(tmp_path, "other")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))  # nothing is drawn again


class Renamed(TinyDenoiser):
    """As after a version of the host in which CLIP's `text_model.` went from the names."""

    def __init__(self):
        super().__init__()
        self.to_k = self._modules.pop("to_q")

    @property
    def to_q(self):
        return self.to_k


@pytest.mark.parametrize("config_of_file", [True, False])
def test_a_layer_that_has_another_name_now_has_the_start_of_the_file(config_of_file):
    trained = adapted()
    state_dict = {
        name.removeprefix("base_model.model.").replace("to_q", "to_k"): tensor
        for name, tensor in get_peft_model_state_dict(trained).items()
    }
    torch.manual_seed(0)
    model = Renamed()
    config = TLoraConfig(**{**CONFIG, "target_modules": ["to_k", "to_out"], "init_seed": 3})
    if config_of_file:
        config = config_from_state_dict(state_dict)
    inject_adapter_in_model(config, model)
    set_peft_model_state_dict(model, state_dict)
    assert_same(outputs(model.eval()), outputs(trained))


@pytest.mark.parametrize("in_features", [0, 7, 9, 2**31])
def test_a_start_for_another_number_of_inputs_is_refused(in_features):
    q, p = torch.empty(4, 3, 3, 3), torch.empty(8, 4, 1, 1)
    _, recipe = new_start(q, p, 1, "last", seed=0, name="layer")
    with pytest.raises(ValueError, match=f"made for {in_features} inputs, it has 3"):
        rebuild(replace(recipe, in_features=in_features), q, p, 1, "layer")


def test_fingerprints_tell_starts_apart():
    q, p = torch.empty(8, 40), torch.empty(24, 8)
    prints = [
        fingerprint(draw_start(q, p, 1, choice, seed=seed, name=name_key(name)))
        for choice in ("last", "principal")
        for seed in range(20)
        for name in ("a", "b")
    ]
    for i, one in enumerate(prints):
        for other in prints[:i]:
            assert sum(abs(a - b) > 1 for a, b in zip(one, other, strict=True)) >= 2


def test_a_copy_keeps_its_start():
    model = adapted()
    assert_same(outputs(copy.deepcopy(model)), outputs(model))


def test_a_hotswap_needs_the_same_start(tmp_path):
    same, other = adapted(), adapted(init_seed=4)
    perturb(same, seed=5)
    same.save_pretrained(tmp_path / "same")
    other.save_pretrained(tmp_path / "other")
    model = adapted()
    with pytest.raises(ValueError, match="Configs are incompatible: for init_seed, 3 != 4"):
        hotswap_adapter(model, tmp_path / "other", "default", torch_device="cpu")
    hotswap_adapter(model, tmp_path / "same", "default", torch_device="cpu")
    assert_same(outputs(model), outputs(same))


def test_it_is_hardly_larger_than_loras_file(tmp_path):
    sizes = []
    for config in (LoraConfig(r=16), TLoraConfig(r=16)):
        config.target_modules = ["proj"]
        model = inject_adapter_in_model(config, nn.ModuleDict({"proj": nn.Linear(1280, 1280)}))
        save_file(get_peft_model_state_dict(model), tmp_path / "file.safetensors")
        sizes.append((tmp_path / "file.safetensors").stat().st_size)
    assert sizes[1] / sizes[0] < 1.01


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_for_inference_takes_no_svd_of_the_weights(
    tmp_path, low_cpu_mem_usage, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("the file has the start")

    model = adapted(**WEIGHT)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(initialization, "weight_triplets", refuse)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert_same(outputs(loaded.eval()), outputs(model))


def test_an_adapter_made_for_inference_without_a_file_is_the_identity():
    model = base().eval()
    before = outputs(model)
    model = get_peft_model(model, TLoraConfig(**CONFIG, inference_mode=True))
    assert_same(outputs(model), before)


def test_a_draw_depends_on_no_threads():
    q, p = torch.empty(64, 1280), torch.empty(640, 64)
    starts = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            starts.append(draw_start(q, p, 1, "last", seed=0, name=name_key("layer")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_a_context_masks_a_rebuilt_adapter():
    model = adapted()
    with timestep_context(model, 999):
        noisy = model.base_model.model.to_q.get_delta_weight("default")
    assert torch.linalg.matrix_rank(noisy) == 2  # one rank, trained and frozen


def test_nothing_depends_on_the_default_device():
    """A host may set any; meta stands for one whose tensors don't go with the CPU's."""
    dq, dp = torch.zeros(6, 8), torch.zeros(8, 6)
    again, recipe = new_start(dq, dp, 1, "last", seed=0, name="to_q")
    schedule = RankSchedule(6, 2)
    expected = encode_schedule(Encoded(schedule, 8.0, False, recipe))
    with torch.device("meta"):
        start, recipe = new_start(dq, dp, 1, "last", seed=0, name="to_q")
        encoded = encode_schedule(Encoded(schedule, 8.0, False, recipe))
        decoded = decode_schedule(encoded, 6, "to_q")
        assert schedule.active_rank(500.0) == 4
        watch = TimestepRange("Net")
        assert watch.complaint(2000.0, schedule, None)
    assert decoded.schedule == schedule
    assert torch.equal(encoded, expected)
    assert all(torch.equal(a, b) for a, b in zip(start, again, strict=True))
