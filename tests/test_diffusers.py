"""T-LoRA through diffusers' own save and load functions."""

import sys

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import peft_utils
from peft import LoraConfig

from peft_tlora import TLoraConfig
from peft_tlora.hosts import diffusers as integration
from peft_tlora.integrations import diffusers as loaders

from . import foreign
from .conftest import perturb, tiny_unet
from .tiny.pipelines import TIMES, LoaderPipeline, save_parts

pytestmark = pytest.mark.upstream

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def adapted(config_cls=TLoraConfig, **kwargs):
    pipeline = LoaderPipeline()
    pipeline.unet.add_adapter(config_cls(r=4, lora_alpha=2, target_modules=UNET_TARGETS, **kwargs))
    pipeline.text_encoder.add_adapter(
        config_cls(r=2, lora_alpha=4, target_modules=TEXT_TARGETS, **kwargs)
    )
    perturb(pipeline.unet)
    perturb(pipeline.text_encoder)
    return pipeline


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "weights alone"])
@pytest.mark.parametrize(
    "fields", [{}, {"min_rank": 1, "rank_schedule": "cosine"}, {"ortho_init": None}]
)
def test_load_lora_weights_generates_with_the_masks_on(tmp_path, fields, metadata):
    trained = adapted(**fields)
    save_parts(trained, tmp_path, metadata)
    loaded = LoaderPipeline()
    loaded.load_lora_weights(str(tmp_path), adapter_name="toy")
    assert_same(loaded.outputs(), trained.outputs())
    assert type(loaded.unet.peft_config["toy"]) is TLoraConfig
    assert type(loaded.text_encoder.peft_config["toy"]) is TLoraConfig


def test_a_state_dict_loads_as_its_file(tmp_path):
    trained = adapted()
    save_parts(trained, tmp_path, metadata=False)
    weights = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path))[0]
    loaded = LoaderPipeline()
    loaded.load_lora_weights(weights)
    assert_same(loaded.outputs(), trained.outputs())


def test_save_and_load_lora_adapter_of_a_model(tmp_path):
    trained = adapted()
    trained.unet.save_lora_adapter(tmp_path)
    loaded = tiny_unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    with torch.no_grad():
        for t in TIMES:
            assert torch.equal(loaded(x, t, e).sample, trained.unet(x, t, e).sample)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "weights alone"])
def test_plain_lora_loads_as_before(tmp_path, metadata):
    save_parts(adapted(LoraConfig), tmp_path, metadata)
    results = []
    for wrapped in (True, False):
        integration.install() if wrapped else loaders.unwrap()
        pipeline = LoaderPipeline()
        pipeline.load_lora_weights(str(tmp_path))
        assert type(pipeline.unet.peft_config["default_0"]) is LoraConfig
        results.append(pipeline.outputs())
    integration.install()
    assert_same(*results)


def test_installing_is_idempotent_and_reversible():
    places = [
        (sys.modules[f"diffusers.{place}"], name)
        for name, places in loaders._PLACES.items()
        for place in places
    ]
    places.append((LoraBaseMixin, "set_lora_device"))
    wrapped = [getattr(place, name) for place, name in places]
    integration.install()
    assert [getattr(place, name) for place, name in places] == wrapped
    loaders.unwrap()
    for (place, name), function in zip(places, wrapped, strict=True):
        assert getattr(place, name) is function.__wrapped__
    integration.install()
    for place, name in places:
        assert hasattr(getattr(place, name), "__wrapped__")
        assert not hasattr(getattr(place, name).__wrapped__, "__wrapped__")


def test_an_unknown_diffusers_warns_and_is_left_alone(monkeypatch):
    def other(something, entirely):
        pass

    loaders.unwrap()
    with monkeypatch.context() as patch:
        patch.setattr(peft_utils, "_create_lora_config", other)
        with pytest.warns(UserWarning, match=r"peft_tlora\.load_tlora_weights"):
            integration.install()
        assert peft_utils._create_lora_config is other
    integration.install()


def kohya(**extra):
    """Plain LoRA as sd-scripts names it, for the unet of the pipeline."""
    tensors = {}
    for name, module in tiny_unet().named_modules():
        if name.endswith(("to_q", "to_v")):
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features)
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4)
            tensors[f"{key}.alpha"] = torch.tensor(4.0)
    return tensors | extra


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_module": "networks.tlora"},
        {"ss_tlora_min_rank": "1"},
        {"tlora_min_rank": "1"},
        {"ss_network_args": '{"algo": "tlora"}'},
        {"algo": "T-LoRA"},
    ],
)
def test_another_programs_t_lora_is_refused_with_the_command_that_converts_it(tmp_path, metadata):
    """Its tensors are those of plain LoRA, and diffusers would load them as such."""
    path = foreign.save(tmp_path / "its.safetensors", kohya(), metadata)
    words = f"as another program writes it.*peft-tlora convert {path} NEW --to diffusers"
    pipeline = LoaderPipeline()
    with pytest.raises(ValueError, match=words):
        pipeline.load_lora_weights(str(path))
    with pytest.raises(ValueError, match=words):
        pipeline.load_lora_weights(str(tmp_path), weight_name="its.safetensors")
    assert not getattr(pipeline.unet, "peft_config", None)


def test_names_of_another_programs_t_lora_tell_it_without_metadata():
    ortho = {"lora_unet_mid_block_attentions_0_proj_in.q_layer.weight": torch.zeros(4, 16)}
    with pytest.raises(ValueError, match="peft-tlora convert FILE NEW"):
        LoaderPipeline().load_lora_weights(kohya(**ortho))


@pytest.mark.parametrize(
    "metadata",
    [{"ss_network_module": "networks.lora", "ss_output_name": "a t-lora toy"}, {"title": "tlora"}],
)
def test_plain_lora_that_speaks_of_t_lora_stays_plain(tmp_path, metadata):
    path = foreign.save(tmp_path / "its.safetensors", kohya(), metadata)
    pipeline = LoaderPipeline()
    pipeline.load_lora_weights(str(path))
    assert type(pipeline.unet.peft_config["default_0"]) is LoraConfig
