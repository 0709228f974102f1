"""What files of T-LoRA say and don't say; test_format_matrix.py converts each into each."""

from dataclasses import replace

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_tlora import TLoraConfig
from peft_tlora.formats.adapter import Adapter
from peft_tlora.formats.facts import TrainingFacts
from peft_tlora.formats.families import family_of
from peft_tlora.formats.lora import write_lora
from peft_tlora.formats.own import write_diffusers, write_peft
from peft_tlora.formats.plain import plain_lora
from peft_tlora.formats.reading import read_adapter

from . import foreign
from .conftest import perturb
from .tiny import families
from .tiny.families import assert_equal
from .trainers import (
    FACTS,
    HPARAMS,
    METADATA,
    official_flux,
    official_sdxl,
    sd_scripts,
    takenoko,
)


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


@pytest.mark.parametrize("start", [False, True])
def test_what_peft_and_diffusers_write_themselves_is_read(tmp_path, start):
    base = families.adapted("sd", save_initial_factors=start)
    expected = families.adapter_of(base)
    weights = get_peft_model_state_dict(base, adapter_name="toy")
    converted = {f"unet.{k}": v for k, v in convert_state_dict_to_diffusers(weights).items()}
    assert any(".lora.down.weight" in name for name in converted)
    assert any(".lora.down_init.weight" in name for name in converted) == start
    save_file(converted, tmp_path / "pytorch_lora_weights.safetensors")
    assert_equal(read_adapter(tmp_path), expected)
    model = get_peft_model(families.model("sd"), TLoraConfig(r=4, target_modules=["to_q", "to_k"]))
    perturb(model)
    model.save_pretrained(tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name, layer = next(iter(read_adapter(tmp_path / "peft").layers.items()))
    assert torch.equal(layer.factors.dq, saved[f"base_model.model.{name}.lora_A.weight"])


def test_a_file_for_several_models_asks_which(tmp_path):
    tensors = {}
    for component in ("unet", "text_encoder"):
        path = write_diffusers(families.adapter("sd", ["to_q"]), tmp_path / "one.safetensors")
        tensors |= {k.replace("unet.", f"{component}."): v for k, v in load_file(path).items()}
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="adapters for text_encoder, unet: choose one"):
        read_adapter(tmp_path / "two.safetensors")
    found = read_adapter(tmp_path / "two.safetensors", component="unet")
    assert found.component == "unet"
    count = sum(name.startswith("text_encoder.") for name in tensors)
    assert found.notes == (
        f"{count} tensors of text_encoder are left out; --component text_encoder reads them.",
    )


def test_a_text_encoders_adapter_is_read_and_is_exact_as_plain_lora_of_one_mask(tmp_path):
    """It has a constant schedule in practice, so one mask is all there is."""
    adapter = families.adapter("sd", ["to_q"], rank_schedule="constant")
    path = write_diffusers(replace(adapter, component="text_encoder"), tmp_path / "a.safetensors")
    found = read_adapter(path)
    assert found.component == "text_encoder"
    plain = load_file(write_lora(plain_lora(found, timestep=900), tmp_path / "b.safetensors"))
    for name, layer in adapter.layers.items():
        up, down = (plain[f"text_encoder.{name}.lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(up @ down, layer.delta(6))
    with pytest.raises(ValueError, match="one of text_encoder; these names are for denoisers only"):
        write_lora(plain_lora(found), tmp_path / "c.safetensors", "kohya", family="sd")


def test_a_peft_folder_of_a_text_encoder_is_not_taken_for_a_transformers(tmp_path):
    layer = next(iter(families.adapter("sd", ["to_q"]).layers.values()))
    layers = {"text_model.encoder.layers.0.self_attn.q_proj": layer}
    folder = write_peft(Adapter("text_encoder", layers), tmp_path)
    assert read_adapter(folder).component == "text_encoder"


def test_video_models_made_of_sds_layers_are_not_taken_for_sd():
    layers = dict(families.adapter("sd", [r"attn2.to_k"]).layers)
    assert family_of(layers) == "sd"
    name = "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q"
    assert family_of(layers | {name: next(iter(layers.values()))}) is None


@pytest.mark.parametrize("make", [sd_scripts, takenoko])
def test_tensors_of_text_encoders_in_a_trainers_file_are_left_out_and_counted(tmp_path, make):
    path, adapter, arguments = make(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors |= {f"lora_te_text_model_{i}.alpha": torch.tensor(1.0) for i in range(3)}
    foreign.save(path, tensors, metadata)
    found = read_adapter(path, **arguments)
    assert_equal(found, adapter)
    assert found.notes == ("3 tensors of text encoders are left out.",)


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
    path, adapter, arguments = sd_scripts(tmp_path)
    foreign.save(path, foreign.sd_scripts(adapter), {**METADATA, "ss_tlora_rank_schedule": "step"})
    with pytest.raises(ValueError, match="ss_tlora_rank_schedule, which this package doesn't know"):
        read_adapter(path, **arguments)


def test_layers_of_several_ranks_under_one_mask_raises(tmp_path):
    adapter = families.adapter("sd", ["to_q", "to_k"], rank_pattern={"to_k": 4})
    path = foreign.save(tmp_path / "a.safetensors", foreign.sd_scripts(adapter), METADATA)
    with pytest.raises(ValueError, match=r"ranks \[4, 6\]"):
        read_adapter(path, base=families.model("sd"))


def test_the_base_is_asked_for_where_names_are_ambiguous_raises(tmp_path):
    path, _, _ = sd_scripts(tmp_path)
    with pytest.raises(ValueError, match="pass the base model"):
        read_adapter(path)
