"""Files of T-LoRA in, files of T-LoRA out: not a bit is lost."""

from functools import partial

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_tlora import TLoraConfig
from peft_tlora.formats.facts import TrainingFacts
from peft_tlora.formats.names import original
from peft_tlora.formats.own import read_diffusers, read_peft, write_diffusers, write_peft
from peft_tlora.formats.reading import read_adapter

from . import foreign
from .conftest import perturb
from .tiny import families
from .tiny.families import assert_equal

FACTS = TrainingFacts(min_rank=2, rank_schedule="power", schedule_exponent=1.0)
METADATA = {
    "ss_tlora_min_rank": "2",
    "ss_tlora_alpha_rank_scale": "1.0",
    "ss_tlora_max_timestep": "1000",
    "ss_tlora_init": "orthogonal",
    "ss_tlora_sig_type": "last",
}
HPARAMS = "trainer_class: sdxl_tlora\ntrainer_type: ortho_lora\nlora_rank: 6\nmin_rank: 2\n"
ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


def wan_name(name):
    return original("wan", name).name


def sgm_name(name):
    return original("sdxl", name).name


def official_sdxl(folder, **fields):
    adapter = families.adapter("sdxl", ATTENTION, lora_alpha=6, num_train_timesteps=1000, **fields)
    path = folder / "pytorch_lora_weights.safetensors"
    foreign.save(path, foreign.official_sdxl(adapter))
    (folder / "logs").mkdir()
    (folder / "logs" / "hparams.yml").write_text(HPARAMS)
    return path, adapter, {}


def official_flux(folder):
    layers = r"transformer_blocks.*\.attn\.(to_[qkv]|to_out\.0|add_._proj)"
    layers += r"|single_transformer_blocks.*\.attn\.to_[qkv]"
    adapter = families.adapter("flux", layers, lora_alpha=6, ortho_init=None)
    path = foreign.save(folder / "lora.pt", foreign.official_flux(adapter))
    facts = TrainingFacts(min_rank=2, rank_schedule="power")
    return path, adapter, {"facts": facts, "allow_pickle": True}


def sd_scripts(folder, family, rename, **fields):
    adapter = families.adapter(family, num_train_timesteps=1000, **fields)
    tensors = foreign.sd_scripts(adapter, rename)
    path = foreign.save(folder / "adapter.safetensors", tensors, METADATA)
    return path, adapter, {"base": families.model(family)}


def takenoko(folder, **fields):
    adapter = families.adapter("wan", **fields)
    path = foreign.save(folder / "adapter.safetensors", foreign.takenoko(adapter, wan_name))
    facts = TrainingFacts(min_rank=2, schedule_exponent=1.0, boundary_timestep=0)
    return path, adapter, {"base": families.model("wan"), "facts": facts}


def own(write, family, folder, **fields):
    adapter = families.adapter(family, **fields)
    return write(adapter, folder / "adapter"), adapter, {}


SOURCES = {
    **{
        f"{name} {family} {kind}": partial(own, write, family, ortho_init=ortho)
        for name, write in (("peft", write_peft), ("diffusers", write_diffusers))
        for family in families.FAMILIES
        for kind, ortho in (("ortho", "last"), ("vanilla", None))
    },
    "official sdxl ortho": official_sdxl,
    "official sdxl vanilla": lambda folder: official_sdxl(folder, ortho_init=None),
    "official flux": official_flux,
    "sd-scripts sd ortho": lambda folder: sd_scripts(folder, "sd", str),
    "sd-scripts sdxl ortho": lambda folder: sd_scripts(folder, "sdxl", sgm_name),
    "sd-scripts sdxl vanilla": lambda folder: sd_scripts(folder, "sdxl", sgm_name, ortho_init=None),
    "takenoko ortho": takenoko,
    "takenoko vanilla": lambda folder: takenoko(folder, ortho_init=None),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_source_is_recognised_and_survives_each_of_our_formats_bit_by_bit(tmp_path, make):
    path, adapter, arguments = make(tmp_path / "source")
    found = read_adapter(path, **arguments)
    assert_equal(found, adapter)
    folder = write_peft(found, tmp_path / "peft")
    assert_equal(read_peft(folder), adapter)
    file = write_diffusers(read_peft(folder), tmp_path / "diffusers" / "adapter.safetensors")
    assert_equal(read_diffusers(file), adapter)


@pytest.mark.parametrize("family", ["sd", "wan"])
def test_peft_loads_what_is_written_for_it_and_computes_the_same(tmp_path, family):
    base = families.adapted(family)
    write_peft(families.adapter_of(base), tmp_path)
    loaded = PeftModel.from_pretrained(families.model(family), tmp_path).eval()
    assert loaded.peft_config["default"].inference_mode
    expected, found = (
        get_peft_model_state_dict(base, adapter_name="toy"),
        get_peft_model_state_dict(loaded),
    )
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[f"base_model.model.{name}"], tensor)


def test_what_peft_and_diffusers_write_themselves_is_read(tmp_path):
    base = families.adapted("sd")
    expected = families.adapter_of(base)
    weights = get_peft_model_state_dict(base, adapter_name="toy")
    converted = {f"unet.{k}": v for k, v in convert_state_dict_to_diffusers(weights).items()}
    assert any(".lora.down_init.weight" in name for name in converted)
    save_file(converted, tmp_path / "pytorch_lora_weights.safetensors")
    assert_equal(read_diffusers(tmp_path), expected)
    model = get_peft_model(families.model("sd"), TLoraConfig(r=4, target_modules=["to_q", "to_k"]))
    perturb(model)
    model.save_pretrained(tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name, layer = next(iter(read_adapter(tmp_path / "peft").layers.items()))
    assert torch.equal(layer.factors.q, saved[f"base_model.model.{name}.lora_A.weight"])


def test_a_file_for_several_models_asks_which(tmp_path):
    tensors = {}
    for component in ("unet", "text_encoder"):
        path = write_diffusers(families.adapter("sd", ["to_q"]), tmp_path / "one.safetensors")
        tensors |= {k.replace("unet.", f"{component}."): v for k, v in load_file(path).items()}
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="adapters for text_encoder, unet: choose one"):
        read_diffusers(tmp_path / "two.safetensors")
    assert read_diffusers(tmp_path / "two.safetensors", component="unet").component == "unet"


@pytest.mark.parametrize("missing", ["min_rank", "rank_schedule", "schedule_exponent"])
def test_what_the_authors_file_does_not_say_is_asked_by_name_raises(tmp_path, missing):
    path, adapter, _ = official_sdxl(tmp_path)
    (tmp_path / "logs" / "hparams.yml").unlink()
    assert_equal(read_adapter(path, facts=FACTS), adapter)
    facts = TrainingFacts(**{**vars(FACTS), missing: None})
    with pytest.raises(ValueError, match=f"doesn't say .*{missing}.*--{missing.replace('_', '-')}"):
        read_adapter(path, facts=facts)


def test_the_authors_training_without_a_mask_has_a_constant_schedule(tmp_path):
    path, _, _ = official_sdxl(tmp_path)
    (tmp_path / "logs" / "hparams.yml").write_text(HPARAMS.replace("sdxl_tlora", "sdxl_lora"))
    schedules = {layer.schedule for layer in read_adapter(path).layers.values()}
    assert {schedule.active_rank(1000) for schedule in schedules} == {6}


def test_facts_that_contradict_the_file_raises(tmp_path):
    path, _, _ = official_sdxl(tmp_path)
    with pytest.raises(ValueError, match=r"min_rank=3 was given, but .*hparams.yml says 2"):
        read_adapter(path, facts=TrainingFacts(min_rank=3))


def test_the_dead_adapters_of_flux_are_left_out_and_that_is_said(tmp_path):
    path, _, arguments = official_flux(tmp_path)
    assert "4 adapters of single blocks" in read_adapter(path, **arguments).notes[0]


@pytest.mark.parametrize("boundary", [None, 875])
def test_takenokos_boundary_is_asked_for_and_refused_unless_it_is_0_raises(tmp_path, boundary):
    path, _, arguments = takenoko(tmp_path)
    facts = TrainingFacts(min_rank=2, schedule_exponent=1.0, boundary_timestep=boundary)
    with pytest.raises(ValueError, match="boundary_timestep"):
        read_adapter(path, **{**arguments, "facts": facts})
    facts = TrainingFacts(rank_schedule="constant", boundary_timestep=875)
    layers = read_adapter(path, **{**arguments, "facts": facts}).layers.values()
    assert {layer.schedule.active_rank(1000) for layer in layers} == {6}


def test_an_unknown_key_of_the_forks_metadata_raises(tmp_path):
    path, adapter, arguments = sd_scripts(tmp_path, "sd", str)
    foreign.save(path, foreign.sd_scripts(adapter), {**METADATA, "ss_tlora_rank_schedule": "step"})
    with pytest.raises(ValueError, match="ss_tlora_rank_schedule, which this package doesn't know"):
        read_adapter(path, **arguments)


def test_layers_of_several_ranks_under_one_mask_raises(tmp_path):
    adapter = families.adapter("sd", ["to_q", "to_k"], rank_pattern={"to_k": 4})
    path = foreign.save(tmp_path / "a.safetensors", foreign.sd_scripts(adapter), METADATA)
    with pytest.raises(ValueError, match=r"ranks \[4, 6\]"):
        read_adapter(path, base=families.model("sd"))


def test_the_base_is_asked_for_where_names_are_ambiguous_raises(tmp_path):
    path, _, _ = sd_scripts(tmp_path, "sd", str)
    with pytest.raises(ValueError, match="pass the base model"):
        read_adapter(path)
