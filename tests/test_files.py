"""Hostile and broken files: a clear error, and nothing has changed."""

import json
import os
import pickle
from dataclasses import replace
from unittest import mock

import pytest
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_tlora import TLoraConfig, load_tlora_weights
from peft_tlora.formats.base import load_base
from peft_tlora.formats.facts import TrainingFacts
from peft_tlora.formats.inspection import inspect_file
from peft_tlora.formats.own import write_diffusers, write_peft
from peft_tlora.formats.reading import read_adapter
from peft_tlora.formats.state_dict import read_config
from peft_tlora.weights import encoding, files
from peft_tlora.weights.encoding import decode_schedule, encode_schedule
from peft_tlora.weights.files import open_file, read_json, read_yaml, write_tensors

from . import foreign
from .conftest import crash_after, crash_while_moving, perturb
from .tiny import families, pipelines
from .trainers import METADATA, official_sdxl, sd_scripts

ROOT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def file(tmp_path):
    adapter = families.adapter("sd", r".*attn1\.to_q")
    return write_diffusers(adapter, tmp_path / "a.safetensors")


def changed(file, **changes):
    """The file with tensors of its first layer exchanged, or left out if None."""
    tensors = load_file(file)
    for name, change in changes.items():
        tensor = tensors.pop(f"{ROOT}.{name}.weight")
        if change is not None:
            tensors[f"{ROOT}.{name}.weight"] = change(tensor).contiguous()
    save_file(tensors, file)
    return file


def with_start(file):
    """The file with the tensors that its factors start from."""
    adapter = read_adapter(file)
    layers = {name: replace(layer, recipe=None) for name, layer in adapter.layers.items()}
    return write_diffusers(replace(adapter, layers=layers), file)


def digit(tensor, value):
    return tensor.index_fill(0, torch.tensor(9), value)


def saying(version=1, **fields):
    """A change of a schedule tensor to another schedule, with the checksum of that."""

    def change(tensor):
        said = decode_schedule(tensor, 6, "layer")
        with mock.patch.object(encoding, "_VERSION", version):
            for name, value in fields.items():
                object.__setattr__(said.schedule, name, value)  # unchecked, as a file may say it
            return encode_schedule(said)

    return change


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_raises(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_adapter(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A": lambda t: t[:3]}, "down-projection|shape|min_rank"),
        ({"lora_A": lambda t: t[:4], "lora_B": lambda t: t[:7, :2]}, "is not one of rank 4"),
        ({"lora_lambda": lambda t: t[:5]}, r"should be \(6, 1\)"),
        ({"lora_lambda": lambda t: t.flatten()}, r"of shape \(6,\) should be \(6, 1\)"),
        ({"lora_B": lambda t: t.flatten()}, "its factors have shapes"),
        ({"lora_A": lambda t: t.long()}, "not of floating point"),
        ({"lora_A": lambda t: t[:0]}, "r must be at least 1, got 0"),
        ({"lora_schedule": lambda t: digit(t, (int(t[9]) + 1) % 8)}, "doesn't add up"),
        ({"lora_schedule": lambda t: digit(t, 8)}, "isn't of whole numbers from 0 to 7"),
        ({"lora_schedule": lambda t: t / 2}, "whole numbers.*Or the file is damaged"),
        ({"lora_schedule": lambda t: t.float().fill_(torch.nan)}, "Or the file is damaged"),
        ({"lora_schedule": lambda t: t[:14]}, r"shape \(\d+,\), got \(14,\): .*another version"),
        ({"lora_schedule": saying(min_rank=100)}, "min_rank"),
        ({"lora_schedule": saying(min_rank=float("inf"))}, "min_rank"),
        ({"lora_schedule": saying(schedule_exponent=float("nan"))}, "exponent"),
        ({"lora_schedule": saying(version=2)}, "has version 2"),
    ],
)
@pytest.mark.parametrize("start", [False, True])
def test_wrong_shapes_and_values_raises(file, start, change, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(changed(with_start(file) if start else file, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A_init": lambda t: t[:, :3]}, r"should be \(6, 8\)"),
        ({"lora_B_init": lambda t: t[:3]}, r"should be \(8, 6\)"),
        ({"lora_lambda_init": lambda t: t.flatten()}, r"should be \(6, 1\)"),
        ({"lora_lambda_init": lambda t: t.int()}, "not of floating point"),
        ({"lora_B_init": None}, "only some of the singular values and frozen factors"),
    ],
)
def test_a_wrong_start_raises(file, change, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(changed(with_start(file), **change))


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
    tensors = foreign.sd_scripts(adapter)
    for name in [name for name in tensors if name.endswith(".q_layer.weight")]:
        tensors[name] = tensors[name].long()
    with pytest.raises(ValueError, match=r"a factor is of torch.int64, not of floating point"):
        read_adapter(foreign.save(path, tensors, METADATA), **arguments)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_refused_unless_asked_for_and_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = foreign.save(tmp_path / "lora.pt", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="is a pickle"):
        open_file(path)
    torch.save({"a": torch.zeros(1), "b": Bomb()}, path)
    with pytest.raises(ValueError, match="can't be unpickled safely"):
        open_file(path, allow_pickle=True)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="can't be unpickled safely"):
        open_file(path, allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_a_tensor_that_claims_more_than_the_file_holds_raises(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(ValueError, match="claims more elements"):
        open_file(path, allow_pickle=True)


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
    families.assert_equal(read_adapter(folder), old if "model" in name else new)


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
    # under names that are in no model whatever is left out in front of them
    more = {name.replace(".to_q.", ".to_x."): tensor for name, tensor in tensors.items()}
    pipe = pipelines.stable_diffusion(unet=families.model("sd"))
    with pytest.warns(UserWarning, match=f"{len(more)} tensors are of no T-LoRA adapter"):
        load_tlora_weights(pipe, tensors | more)


def test_damaged_weights_are_refused_before_the_model_changes_raises(tmp_path):
    adapter = families.adapter("sd", [r"attn1.to_q"])
    path = changed(write_diffusers(adapter, tmp_path), lora_lambda=lambda t: t[:5])
    pipe = pipelines.stable_diffusion(unet=families.model("sd"))
    with pytest.raises(ValueError, match=r"should be \(6, 1\)"):
        load_tlora_weights(pipe, path)
    assert not any("lora" in name for name, _ in pipe.unet.named_modules())


def test_a_folder_with_several_files_asks_which_raises(file):
    write_diffusers(read_adapter(file), file.with_name("b.safetensors"))
    with pytest.raises(ValueError, match=r"found a\.safetensors, b\.safetensors; name the file"):
        read_adapter(file.parent)


def test_json_is_written_whole(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2]}


# how hosts name the trained tensors of a layer
NAMES = {
    "PEFT": "base_model.model.{}.lora_{}.weight",
    "diffusers": "unet.{}.lora_{}.weight",
    "a model": "{}.lora_{}.toy.weight",
    "wrappers": "_orig_mod.module.base_model.model.{}.lora_{}.my.toy.weight",
    "a compiled part": "unet._orig_mod.{}.lora_{}.toy.weight",
}
AROUND = "model.denoiser.{}.lora_{}.toy.weight"
SAID = {"num_train_timesteps": 1000.0, "timestep_reversed": False}


def trained_alone(folder, names=NAMES["a model"], layers=r".*attn1\.to_q|.*\.conv1", **fields):
    """A file as a host writes it that keeps what requires grad, the adapter, and its config."""
    model = families.adapted("sd", layers, **fields)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, part = name.removesuffix(".toy.weight").rpartition(".lora_")
            tensors[names.format(layer, part)] = parameter.detach()
    path = foreign.save(folder / "trained.safetensors", tensors)
    return path, families.adapter_of(model), model.peft_config["toy"]


@pytest.mark.parametrize("read", [read_adapter, inspect_file])
@pytest.mark.parametrize("names", [*NAMES.values(), AROUND])
def test_trained_tensors_alone_are_refused_by_name_raises(tmp_path, read, names):
    path, _, _ = trained_alone(tmp_path, names)
    with pytest.raises(ValueError, match=r"trained tensors of a T-LoRA .*alone.*--config FILE"):
        read(path)


@pytest.mark.parametrize("read", [read_adapter, inspect_file])
@pytest.mark.parametrize("names", [*NAMES.values(), AROUND, "old"])
def test_plain_lora_is_refused_by_name_raises(tmp_path, read, names):
    old = names == "old"  # of diffusers' files
    path, _, _ = trained_alone(tmp_path, NAMES["diffusers"] if old else names, ortho_init=None)
    if old:
        new = {"lora_A": "lora.down", "lora_B": "lora.up"}
        tensors = {
            name.replace(x, new[x]): t
            for name, t in load_file(path).items()
            for x in new
            if x in name
        }
        assert len(tensors) == len(load_file(path))
        foreign.save(path, tensors)
    with pytest.raises(ValueError, match="no lora_schedule and no lora_lambda: it is plain LoRA"):
        read(path)
    config = TLoraConfig(r=6, min_rank=2, **SAID)
    with pytest.raises(ValueError, match=r"With ortho_init='last' layer .* Is it plain LoRA"):
        read(path, config=config)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_trained_tensors_with_their_config_are_the_whole_adapter(tmp_path, names, base):
    path, expected, config = trained_alone(tmp_path, names, **({} if base else SAID))
    base = families.model("sd").to("meta") if base else None
    found = read_adapter(path, config=config, base=base)
    families.assert_equal(found, expected)
    assert [("such as down_blocks" in note) for note in found.notes] == [True] * (base is None)


@pytest.mark.parametrize(
    "fields",
    [
        {"ortho_init": "middle", "init_seed": 5, "use_rslora": True, **SAID},
        {"ortho_init": None, **SAID},
        {"ortho_init": "principal", "num_train_timesteps": 500, "timestep_reversed": True},
        {"rank_pattern": {"to_q": 4}, "alpha_pattern": {r"conv\d": 7, "to_q": 2.5}, **SAID},
        {"timestep_type": "log_sigma", "schedule_exponent": 2, "rank_schedule": "cosine"},
        {"rank_schedule": "constant", "rank_multiple": 2, **SAID},
        {"init_lora_weights": False, **SAID},
    ],
)
def test_every_field_of_the_config_counts(tmp_path, fields):
    path, expected, config = trained_alone(tmp_path, **fields)
    families.assert_equal(read_adapter(path, config=config), expected)
    families.assert_equal(read_adapter(path, config=config, base=families.model("sd")), expected)


class Mixed(nn.Module):
    """Layers whose tensors PEFT names in a way of its own, or that have groups."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv1d(8, 4, 3, groups=2)

    def forward(self, x, timestep):
        return self.conv(self.attn(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_attention_and_groups_are_completed_as_they_were_trained(tmp_path):
    model = Mixed()
    config = TLoraConfig(r=4, target_modules=["attn", "conv"], **SAID)
    inject_adapter_in_model(config, model, adapter_name="toy")
    perturb(model)
    whole = foreign.save(tmp_path / "a.safetensors", get_peft_model_state_dict(model, None, "toy"))
    trained = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    path = foreign.save(tmp_path / "b.safetensors", trained)
    found = read_adapter(path, config=config)
    assert found.layers.keys() == {"attn", "attn.base_layer.out_proj", "conv"}
    families.assert_equal(found, read_adapter(whole))


def test_modules_around_the_model_are_told_by_the_base_alone(tmp_path):
    path, expected, config = trained_alone(tmp_path, AROUND, **SAID)
    families.assert_equal(
        read_adapter(path, config=config, base=families.model("sd"), component="unet"), expected
    )
    found = read_adapter(path, config=config)
    assert all(name.startswith("model.denoiser.") for name in found.layers)
    assert "such as model.denoiser.down_blocks" in found.notes[0]
    with pytest.raises(
        ValueError, match=r"Wan\w+ has no layer model\.denoiser\.down_blocks.*another"
    ):
        read_adapter(path, config=config, base=families.model("wan"))


def test_whole_state_dicts_of_hosts_need_no_config(tmp_path):
    """The idiom `{name: tensor for name, tensor in state_dict if "lora" in name}`."""
    model = families.adapted("sd", [r"attn1.to_q"], save_initial_factors=True)
    tensors = {name: t for name, t in model.state_dict().items() if "lora_" in name}
    path = foreign.save(tmp_path / "a.safetensors", tensors)
    families.assert_equal(read_adapter(path), families.adapter_of(model))
    plain = get_peft_model_state_dict(model, adapter_name="toy")  # no prefix at all
    path = foreign.save(tmp_path / "b.safetensors", plain)
    families.assert_equal(read_adapter(path), families.adapter_of(model))
    around = {f"model.denoiser.{name}": tensor for name, tensor in tensors.items()}
    path = foreign.save(tmp_path / "c.safetensors", around)
    families.assert_equal(read_adapter(path, base=families.model("sd")), families.adapter_of(model))


def test_a_start_beside_trained_tensors_takes_the_place_of_the_configs(tmp_path):
    path, _, config = trained_alone(tmp_path, ortho_source="weight", **SAID)
    with pytest.raises(ValueError, match=r"ortho_source='weight': .*doesn't hold the start"):
        read_adapter(path, config=config)
    model = families.adapted("sd", [r"attn1.to_q"], ortho_source="weight", **SAID)
    tensors = {n: t for n, t in model.state_dict().items() if "lora_" in n and "schedule" not in n}
    found = read_adapter(foreign.save(path, tensors), config=model.peft_config["toy"])
    families.assert_equal(found, families.adapter_of(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_train_timesteps": None}, "doesn't say num_train_timesteps, which .*--base FOLDER"),
        ({"timestep_reversed": None}, "doesn't say timestep_reversed, which .*such as num_train"),
        ({"ortho_init": None}, "With ortho_init=None layer .*trained with another ortho_init"),
        ({"ortho_source": "weight"}, "ortho_source='weight': "),
        ({"init_seed": None}, "init_seed=None: "),
        ({"r": 8}, "has rank 6 in the source and 8 in the config"),
        ({"rank_pattern": {"conv1": 4}}, r"\.conv1 has rank 6 in the source and 4 in"),
    ],
)
def test_a_config_that_does_not_say_enough_or_is_of_another_training_raises(
    tmp_path, fields, message
):
    path, _, config = trained_alone(tmp_path, **SAID)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        read_adapter(path, config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {f"module.{k}": v for k, v in t.items()}, "says again what another tensor"),
        (lambda t: t | {k.replace("toy", "b"): v for k, v in t.items()}, "adapters, b, toy: leave"),
        (lambda t: {f"{x}.{k}": v for k, v in t.items() for x in ("unet", "prior")}, "choose one"),
        (lambda t: {k: v[:1, :1].flatten() for k, v in t.items()}, "has no down-projection"),
        (lambda t: {k: v[..., :0] for k, v in t.items()}, "its factors have shapes"),
        (lambda t: {k: v if "lora_A" in k else v[:, :4] for k, v in t.items()}, "not one of rank"),
        (lambda t: {f"a..{k}": v for k, v in t.items()}, "is not the name of a layer"),
        (
            lambda t: {k: v for k, v in t.items() if "lora_B" not in k},
            "the source has lora_A, lora_lambda. Is",
        ),
    ],
)
def test_state_dicts_that_are_not_one_adapter_raises(tmp_path, change, message):
    path, _, config = trained_alone(tmp_path, layers=[r"attn1.to_q"], **SAID)
    tensors = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    foreign.save(path, tensors)
    with pytest.raises(ValueError, match=message):
        read_adapter(path, config=config)


def test_a_config_for_a_file_that_has_its_schedule_raises(tmp_path, file):
    config = TLoraConfig(r=6, min_rank=2, **SAID)
    for path in (file, write_peft(read_adapter(file), tmp_path / "p")):
        with pytest.raises(ValueError, match=r"config was given, but .*has no use for it"):
            read_adapter(path, config=config)
    tensors = {k.replace(".weight", ".toy.weight"): v for k, v in load_file(file).items()}
    path = foreign.save(tmp_path / "b.safetensors", tensors)
    families.assert_equal(read_adapter(path), read_adapter(file))
    with pytest.raises(ValueError, match="says itself how the adapter was trained"):
        read_adapter(path, config=config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "should hold names and values, got list"),
        ('{"r": 4, "ranks": 3, "a": 0}', "has a, ranks, which is no argument of TLoraConfig"),
        ('{"r": 4, "peft_type": "LORA"}', "is the config of LORA, not of a T-LoRA adapter"),
        ('{"r": "4"}', "is no TLoraConfig: r must be an int"),
        ('{"rank_pattern": [4]}', "is no TLoraConfig"),
        ('{"alpha_pattern": {"(": 4}}', "is no TLoraConfig"),
        ('{"min_rank": 99}', "is no TLoraConfig: min_rank"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_configs_that_are_none_raises(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text(content)
    for source in (tmp_path, tmp_path / "adapter_config.json"):
        with pytest.raises(ValueError, match=message):
            read_config(source)


def test_configs_are_read_as_peft_writes_them_and_as_arguments(tmp_path):
    config = TLoraConfig(r=4, target_modules=["to_q"], ortho_init="middle", init_seed=7)
    config.save_pretrained(tmp_path / "folder")
    assert read_config(tmp_path / "folder") == config
    arguments = {"r": 4, "target_modules": ["to_q"], "ortho_init": "middle", "init_seed": 7}
    files.write_json(tmp_path / "a.json", arguments)
    assert read_config(tmp_path / "a.json") == config
