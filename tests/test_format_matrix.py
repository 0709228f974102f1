"""Each format that can be read, converted by the command into each that can be written.

T-LoRA formats keep every bit and the schedule. Plain LoRA makes each layer's masked update to
`BOUND` of its norm, in the layer and the rows that the program's own tables name. LyCORIS' frozen
factors are recomputed from the same weights, which costs up to `RECOMPUTED` of the update's norm.
"""

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from peft_tlora.cli import main
from peft_tlora.formats.lora import LORA_NAMES
from peft_tlora.formats.own import write_diffusers, write_peft
from peft_tlora.formats.reading import FORMATS, read_adapter

from . import foreign, trainers
from .tiny import families
from .tiny.families import MIDDLE, PROGRAMS, expected_deltas

BOUND = 1e-6
RECOMPUTED = 1e-5
FLOWS = ("sd3", "flux", "wan")
# one layer of each family that kohya's trainers have no LoRA for, or with other rows
REFUSED = {
    "sd": "conv_in",
    "sdxl": "add_embedding.linear_1",
    "sd3": "transformer_blocks.0.norm1_context.linear",
    "flux": "norm_out.linear",
    "wan": "proj_out",
}


KINDS = {"ortho": "last", "vanilla": None}


def own(write, folder, family, **fields):
    adapter = families.adapter(family, **fields)
    return write(adapter, folder / "adapter"), adapter, {}


def of_host(folder, family, ortho_init):
    """The parameters of a wrapped model that its training changed."""
    model = families.adapted(family, ortho_init=ortho_init)
    model.peft_config["toy"].save_pretrained(folder)
    tensors = {f"module.{k}": p.detach() for k, p in model.named_parameters() if p.requires_grad}
    path = foreign.save(folder / "trained.safetensors", tensors)
    arguments = {"base": families.model(family), "config": folder}
    return path, families.adapter_of(model), arguments


def of_lycoris(folder, family, ortho_init):
    total = 1.0 if family == "flux" else 1000.0
    path, adapter, base = trainers.lycoris(folder, family, ortho_init, num_train_timesteps=total)
    facts = replace(trainers.LYCORIS_FACTS, sig_type=ortho_init, num_train_timesteps=total)
    return path, adapter, {"base": base, "facts": facts}


# format -> what makes a file of it, the families and the kinds that it has
SOURCES = {
    "peft": (partial(own, write_peft), families.FAMILIES, KINDS),
    "diffusers": (partial(own, write_diffusers), families.FAMILIES, KINDS),
    "state_dict": (of_host, families.FAMILIES, KINDS),
    "official_sdxl": (trainers.official_sdxl, ["sdxl"], KINDS),
    "official_flux": (trainers.official_flux, ["flux"], ["vanilla"]),
    "sd_scripts": (trainers.sd_scripts, ["sd", "sdxl"], KINDS),  # a fork for U-Nets
    "takenoko": (trainers.takenoko, ["wan"], KINDS),
    "lycoris": (of_lycoris, families.FAMILIES, ["ortho"]),  # its tlora has no other kind
}
CASES = [(name, f, kind) for name, (_, fs, kinds) in SOURCES.items() for f in fs for kind in kinds]
TLORA = ("peft", "diffusers")
PLAIN = ("lora", "kohya", "comfyui")


@dataclass(frozen=True)
class Source:
    """A file, the adapter in it, and the options of the command that it needs."""

    format: str
    family: str
    path: object
    adapter: object
    options: tuple

    @property
    def bound(self):
        return RECOMPUTED if self.format == "lycoris" else BOUND


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def source(request, tmp_path_factory):
    name, family, kind = request.param
    folder = tmp_path_factory.mktemp("source")
    path, adapter, arguments = SOURCES[name][0](folder, family, ortho_init=KINDS[kind])
    options = ["--allow-pickle"] if arguments.pop("allow_pickle", False) else []
    if "base" in arguments:
        arguments.pop("base").save_pretrained(folder / "base")
        options += ["--base", folder / "base"]
    if "config" in arguments:
        options += ["--config", arguments.pop("config")]
    for fact, value in vars(arguments.pop("facts", trainers.TrainingFacts())).items():
        options += [] if value is None else [f"--{fact.replace('_', '-')}", value]
    assert not arguments
    return Source(name, family, path, adapter, tuple(options))


def convert(source, destination, *options):
    arguments = ("convert", source.path, destination, *options, *source.options)
    assert main([str(argument) for argument in arguments]) == 0
    return destination


def places(family, name):
    """The original weight in the place of a layer, and the rows in a model of full size.

    From ComfyUI's own tables, which have Wan's layers by their original names alone.
    """
    known = PROGRAMS[family]["comfyui"]
    if family in ("sd", "sdxl"):
        return known["lora_unet_" + name.replace(".", "_")]
    if family != "wan":
        return known[f"transformer.{name}"]
    for ours, theirs in {
        "attn1.to_": "self_attn.",
        "attn2.to_": "cross_attn.",
        "out.0": "o",
        "net.0.proj": "0",
        "net.2": "2",
    }.items():
        name = name.replace(ours, theirs)
    return known[f"diffusion_model.{name}"]


def key_of(to, family, component, name):
    """What the program calls a layer."""
    weight, _ = places(family, name)
    if to == "lora":
        return f"{component}.{name}"
    if to == "kohya":
        return "lora_unet_" + (name if family == "sd" else weight).replace(".", "_")
    if family in ("sd", "sdxl"):
        return "lora_unet_" + name.replace(".", "_")
    return f"diffusion_model.{weight}" if family == "wan" else f"transformer.{name}"


def updates(path):
    """The updates that a plain LoRA file makes, by key, in float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    found = {}
    for name in list(tensors):
        for down, up in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_down.weight", ".lora_up.weight"),
        ):
            if name.endswith(down):
                key = name.removesuffix(down)
                q, p = tensors.pop(name), tensors.pop(key + up)
                scale = tensors.pop(f"{key}.alpha", torch.tensor(len(q))) / len(q)
                found[key] = (p.flatten(1) @ q.flatten(1) * scale).reshape(len(p), *q.shape[1:])
    assert not tensors
    return found


def rows_of(to, family, name, update):
    """The rows of an update that are those of a layer, in a model of any size."""
    weight, rows = places(family, name)
    if to != "kohya" or rows is None:
        return slice(None)
    parts = PROGRAMS[family]["comfyui"].values()
    whole = max(part[1] for other, part in parts if other == weight)
    return slice(*(row * len(update) // whole for row in rows))


def assert_masked(path, to, source, t):
    """Check that a file makes each layer's update at a timestep, and no other."""
    found = updates(path)
    for name, expected in expected_deltas(source.adapter, t).items():
        update = found[key_of(to, source.family, source.adapter.component, name)]
        rows = rows_of(to, source.family, name, update)
        assert update[rows].shape == expected.shape
        assert (update[rows] - expected).norm() <= source.bound * expected.norm(), name
        update[rows] = 0
    assert not any(update.any() for update in found.values())


def test_the_table_has_every_format():
    assert SOURCES.keys() == FORMATS.keys()
    assert set(PLAIN) == set(LORA_NAMES)


@pytest.mark.parametrize("to", TLORA)
def test_a_t_lora_format_keeps_every_bit_and_the_schedule(tmp_path, source, to):
    found = read_adapter(convert(source, tmp_path / "out", "--to", to))
    if source.format != "lycoris":
        families.assert_equal(found, source.adapter)
        return
    assert found.layers.keys() == source.adapter.layers.keys()
    updates, file = expected_deltas(found, 500), load_file(source.path)
    for name, expected in expected_deltas(source.adapter, 500).items():
        layer, other = found.layers[name], source.adapter.layers[name]
        assert (layer.schedule, layer.scaling) == (other.schedule, other.scaling)
        key = f"lycoris_{name.replace('.', '_')}"
        wholes = (file[f"{key}.{x}"] for x in ("q_layer.weight", "p_layer.weight", "lambda_layer"))
        for difference, whole, start in zip(
            layer.factors[:3], wholes, layer.factors[3:], strict=True
        ):
            assert torch.equal(difference, whole.reshape(start.shape) - start)
        assert (updates[name] - expected).norm() <= source.bound * expected.norm(), name


@pytest.mark.parametrize("to", PLAIN)
def test_a_plain_lora_makes_the_masked_update_of_each_layer(tmp_path, source, to):
    t = MIDDLE.get(source.family, 500)
    path = convert(source, tmp_path / "a.safetensors", "--to", to, "--timestep", t)
    assert_masked(path, to, source, t)


def test_each_band_makes_the_masked_update_of_each_layer(tmp_path, source):
    shift = ("--shift", 3) if source.family in FLOWS else ()
    folder = convert(source, tmp_path / "bands", "--to", "comfyui", "--bands", 2, *shift)
    bands = json.loads((folder / "bands.json").read_text())["bands"]
    assert len(bands) == 2
    for band in bands:
        assert_masked(folder / band["file"], "comfyui", source, band["mask_timestep"])


@pytest.mark.parametrize(("family", "layer"), REFUSED.items())
def test_a_layer_that_the_program_has_no_lora_for_is_refused_by_name_raises(
    tmp_path, capsys, family, layer
):
    path = write_diffusers(families.adapter(family, [layer]), tmp_path / "a.safetensors")
    arguments = ("convert", path, tmp_path / "out", "--to", "kohya", "--family", family)
    assert main([str(argument) for argument in arguments]) == 1
    assert f"Layer {layer} has no name in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
