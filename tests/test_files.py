"""Hostile and broken files: a clear error, and nothing has changed."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save_file

from peft_tlora import TLoraConfig, load_tlora_weights
from peft_tlora.formats import files
from peft_tlora.formats.base import load_base
from peft_tlora.formats.facts import TrainingFacts
from peft_tlora.formats.files import open_checkpoint, read_json, read_yaml, write_tensors
from peft_tlora.formats.own import read_diffusers, read_peft, write_diffusers, write_peft
from peft_tlora.formats.reading import read_adapter

from . import foreign
from .conftest import crash_after, crash_while_moving
from .test_formats import METADATA, official_sdxl, sd_scripts
from .tiny import families, pipelines

ROOT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def file(tmp_path):
    adapter = families.adapter("sd", r".*attn1\.to_q")
    return write_diffusers(adapter, tmp_path / "a.safetensors")


def changed(file, **changes):
    """The file with tensors of its first layer exchanged, or left out if None."""
    tensors = load_file(file)
    for name, change in changes.items():
        key = f"{ROOT}.{name}.weight"
        tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_raises(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_adapter(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A": lambda t: t[:3]}, "down-projection|shape|min_rank"),
        ({"lora_A_init": lambda t: t[:, :3]}, r"should be \(6, 8\)"),
        ({"lora_lambda": lambda t: t[:5]}, r"should be \(6,\)"),
        ({"lora_B": lambda t: t.flatten()}, "its factors have shapes"),
        ({"lora_A": lambda t: t.long()}, "not of floating point"),
        ({"lora_A": lambda t: t[:0]}, r"rank must lie in \[1, 65536\], got 0"),
        ({"lora_schedule": lambda t: t.index_fill(0, torch.tensor(3), 0x7FF0 << 48)}, "damaged"),
        ({"lora_schedule": lambda t: t.index_fill(0, torch.tensor(3), 0x4059 << 48)}, "min_rank"),
        ({"lora_schedule": lambda t: t.index_fill(0, torch.tensor(2), 0x7FF8 << 48)}, "exponent"),
        ({"lora_schedule": lambda t: t.index_fill(0, torch.tensor(0), 9)}, "newer peft_tlora"),
    ],
)
def test_wrong_shapes_and_values_raises(file, change, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(changed(file, **change))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a.__class__.b", "a..b", "C:\\x", "(a+)+$"])
def test_names_that_are_no_layers_raises(file, name):
    tensors = {k.replace(ROOT, f"unet.{name}"): v for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is not the name of a layer"):
        read_adapter(file)


def test_a_mixture_of_formats_raises(file):
    adapter = families.adapter("sd", ["to_q"])
    save_file(load_file(file) | foreign.sd_scripts(adapter), file)
    with pytest.raises(ValueError, match="or a mixture of several"):
        read_adapter(file)
    save_file({"something.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no T-LoRA file of a known format"):
        read_adapter(file)


def test_metadata_that_is_no_number_raises(tmp_path):
    adapter = families.adapter("sd", ["to_q"])
    path = tmp_path / "a.safetensors"
    base = families.model("sd")
    for value in ("9" * 5000, "1e400", "__import__('os')", "-1"):
        metadata = {"ss_tlora_min_rank": value, "ss_tlora_alpha_rank_scale": "1"}
        foreign.save(path, foreign.sd_scripts(adapter), metadata)
        facts = TrainingFacts(num_train_timesteps=1000)
        with pytest.raises(ValueError, match=r"no number|min_rank"):
            read_adapter(path, base=base, facts=facts)


@pytest.mark.parametrize(("suffix", "read"), [(".json", read_json), (".yml", read_yaml)])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("{" + " " * (1 << 21), "too large"),
        ("a: {]", "no (JSON|YAML) of plain values"),
        ("!!python/object/apply:os.system ['true']", "no (JSON|YAML) of plain values"),
        ("\udcff", "no (JSON|YAML) of plain values"),
    ],
)
def test_texts_that_are_none_raises(tmp_path, suffix, read, content, message):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_base_is_read_from_safetensors_alone_raises(tmp_path):
    """diffusers would go on to a pickle where there are none."""
    families.model("sd").save_pretrained(tmp_path, safe_serialization=False)
    assert [path.suffix for path in tmp_path.glob("diffusion*")] == [".bin"]
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        load_base(tmp_path, weights=True)
    assert load_base(tmp_path, weights=False).device.type == "meta"


def test_values_of_another_kind_than_they_should_be_raises(tmp_path):
    path, _, _ = official_sdxl(tmp_path / "a")
    hparams = tmp_path / "a" / "logs" / "hparams.yml"
    hparams.write_text("trainer_class: [sdxl_tlora]")
    with pytest.raises(ValueError, match=r"has trainer_class \['sdxl_tlora'\]"):
        read_adapter(path)
    path, adapter, arguments = sd_scripts(tmp_path)
    tensors = foreign.sd_scripts(adapter)
    tensors[next(name for name in tensors if name.endswith(".alpha"))] = torch.zeros(0)
    with pytest.raises(ValueError, match=r"has an alpha of shape \(0,\), not a number"):
        read_adapter(foreign.save(path, tensors, METADATA), **arguments)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_refused_unless_asked_for_and_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = foreign.save(tmp_path / "lora.pt", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="is a pickle"):
        open_checkpoint(path)
    torch.save({"a": torch.zeros(1), "b": Bomb()}, path)
    with pytest.raises(ValueError, match="can't be unpickled safely"):
        open_checkpoint(path, allow_pickle=True)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="can't be unpickled safely"):
        open_checkpoint(path, allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_a_tensor_that_claims_more_than_the_file_holds_raises(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(ValueError, match="claims more elements"):
        open_checkpoint(path, allow_pickle=True)


def test_a_crash_while_writing_leaves_the_old_file_alone(file, monkeypatch):
    before = file.read_bytes()
    crash_after(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="power cut"):
        write_tensors(file, {"a": torch.zeros(3)})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("written", [0, 1])
def test_a_crash_while_a_peft_folder_is_written_leaves_the_old_one_alone(
    tmp_path, monkeypatch, written
):
    """Config and weights were once replaced one after the other: a new config with old weights."""
    folder = write_peft(families.adapter("sd", ["to_q"]), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    crash_after(monkeypatch, written)
    with pytest.raises(RuntimeError, match="power cut"):
        write_peft(families.adapter("sd", ["to_k"], lora_alpha=9), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_crash_while_a_peft_folder_is_replaced_leaves_no_config_of_other_weights(
    tmp_path, monkeypatch, name
):
    """PEFT would load old weights with the config of new ones without an error."""
    old, new = families.adapter("sd", ["to_q"]), families.adapter("sd", ["to_q"], lora_alpha=9)
    folder = write_peft(old, tmp_path)
    crash_while_moving(monkeypatch, name)
    with pytest.raises(RuntimeError, match="power cut"):
        write_peft(new, folder)
    assert [path.name for path in folder.iterdir()] == ["adapter_model.safetensors"]
    families.assert_equal(read_peft(folder), old if "model" in name else new)


def test_a_folder_that_a_failed_export_made_is_gone(tmp_path, monkeypatch):
    crash_after(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="power cut"):
        write_peft(families.adapter("sd", ["to_q"]), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused_before_the_model_changes_raises(file):
    pipe = pipelines.stable_diffusion()
    names = {name for name, _ in pipe.unet.named_modules()}
    with pytest.raises(ValueError, match=r"doesn't fit: .*Is it for another base model"):
        load_tlora_weights(pipe, file)
    assert {name for name, _ in pipe.unet.named_modules()} == names
    with pytest.raises(ValueError, match="doesn't fit"):
        read_adapter(file, base=families.model("sdxl"))


@pytest.mark.parametrize(("family", "layers"), [("sd", r".*attn1\.to_q"), ("sdxl", r".*conv2")])
def test_diffusers_own_loader_refuses_another_base_before_the_model_changes_raises(
    tmp_path, family, layers
):
    """It used to leave layers in the model when torch found that the shapes differ."""
    path = write_diffusers(families.adapter(family, layers), tmp_path)
    pipe = pipelines.stable_diffusion()
    with pytest.raises(ValueError, match=r"doesn't fit: .*Is it for another base model"):
        pipe.load_lora_weights(str(path))
    assert not any("lora" in name for name, _ in pipe.unet.named_modules())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("change", ["width", "depth"])
def test_diffusers_own_loader_refuses_another_text_encoder_before_it_changes_raises(
    tmp_path, change
):
    """Of a deeper one it used to load what fits, and of a wider one to leave layers behind."""
    pipe = pipelines.stable_diffusion()
    fitting = text_encoder_file(tmp_path, pipelines.text_encoder())
    pipe.load_lora_weights(fitting, adapter_name="fits")
    before = {name for name, _ in pipe.text_encoder.named_modules()}
    sizes = {"width": {"hidden_size": 24}, "depth": {"num_hidden_layers": 3}}[change]
    other = text_encoder_file(tmp_path / "other", pipelines.text_encoder(**sizes))
    with pytest.raises(ValueError, match=r"doesn't fit: .*Is it for another base model"):
        pipe.load_lora_weights(other, adapter_name="other")
    assert {name for name, _ in pipe.text_encoder.named_modules()} == before
    assert pipe.text_encoder.peft_config.keys() == {"fits"}
    pipe.load_lora_weights(fitting, adapter_name="other")  # the name is free


def text_encoder_file(folder, model):
    config = TLoraConfig(r=4, target_modules=["q_proj"], rank_schedule="constant")
    inject_adapter_in_model(config, model, adapter_name="toy")
    adapter = replace(families.adapter_of(model), component="text_encoder")
    return str(write_diffusers(adapter, folder / "text_encoder.safetensors"))


def test_tensors_that_no_model_of_the_pipeline_takes_are_counted(tmp_path):
    path = write_diffusers(families.adapter("sd", [r"attn1.to_q"]), tmp_path)
    tensors = load_file(path)
    more = {f"other.{name}": tensor for name, tensor in tensors.items()}
    pipe = pipelines.stable_diffusion(unet=families.model("sd"))
    with pytest.warns(UserWarning, match=f"{len(more)} tensors are of no T-LoRA adapter"):
        load_tlora_weights(pipe, tensors | more)


def test_damaged_weights_are_refused_before_the_model_changes_raises(tmp_path):
    adapter = families.adapter("sd", [r"attn1.to_q"])
    path = changed(write_diffusers(adapter, tmp_path), lora_lambda=lambda t: t[:5])
    pipe = pipelines.stable_diffusion(unet=families.model("sd"))
    with pytest.raises(ValueError, match=r"should be \(6,\)"):
        load_tlora_weights(pipe, path)
    assert not any("lora" in name for name, _ in pipe.unet.named_modules())


def test_a_folder_with_several_files_asks_which_raises(file):
    write_diffusers(read_diffusers(file), file.with_name("b.safetensors"))
    with pytest.raises(ValueError, match=r"found a\.safetensors, b\.safetensors; name the file"):
        read_adapter(file.parent)


def test_json_is_written_whole(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2]}
