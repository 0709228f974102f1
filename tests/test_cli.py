"""The command line: what it prints, writes, and how it ends."""

import json
import sys

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import peft_tlora
from peft_tlora import active_rank
from peft_tlora.cli import main
from peft_tlora.formats import read_adapter
from peft_tlora.formats.own import write_diffusers, write_peft

from . import foreign
from .tiny import families
from .trainers import official_flux, official_sdxl, sd_scripts


@pytest.fixture
def file(tmp_path):
    return write_diffusers(
        families.adapter("sd", r".*(to_q|attn2\.to_k)"), tmp_path / "a.safetensors"
    )


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_help_lists_all_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("inspect", "convert", "schedule", "run"):
        assert f"\n    {name} " in out


def test_colours_are_for_terminals_alone(capsys, file, monkeypatch):
    assert "\033" not in run(capsys, "inspect", file)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[1mformat:\033[0m" in run(capsys, "inspect", file)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(capsys, "inspect", file)[1]


def test_inspect_tells_format_schedule_and_how_far_each_layer_moved(capsys, file):
    code, out, err = run(capsys, "inspect", file)
    assert (code, err) == (0, "")
    for text in (
        "diffusers (file of diffusers)",
        "6 in 12 layers",
        "min_rank=2",
        "8 to_q",
        "4 to_k",
    ):
        assert text in out
    code, out, _ = run(capsys, "inspect", file, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["bytes"] == file.stat().st_size
    adapter = read_adapter(file)
    assert report["layers"].keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        dq, dp, dlam, q0, p0, lam0 = (f.double() for f in layer.factors)
        start = p0 @ torch.diag(lam0.flatten()) @ q0
        change = (p0 + dp) @ torch.diag((lam0 + dlam).flatten()) @ (q0 + dq) - start
        values = torch.linalg.svdvals(change)
        shares = values[values > 1e-9] / values.sum()
        found = report["layers"][name]
        assert found["moved"] == pytest.approx((change.norm() / start.norm()).item(), rel=1e-4)
        entropy = -(shares * shares.log()).sum()
        assert found["effective_rank"] == pytest.approx(entropy.exp().item(), rel=1e-3)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_inspect_tells_the_family(capsys, tmp_path, family):
    layers = r".*(attn1?|attn2)\.(to_q|to_k)"
    path = write_peft(families.adapter(family, layers), tmp_path)
    assert json.loads(run(capsys, "inspect", path, "--json")[1])["family"] == family


def test_a_family_that_contradicts_the_layers_is_refused(capsys, tmp_path):
    path = write_peft(families.adapter("sdxl", r".*(attn1?|attn2)\.(to_q|to_k)"), tmp_path)
    for family, expected in (("sd", 1), ("sdxl", 0)):
        to = ("--to", "kohya", "--timestep", "500", "--family", family)
        code, _, err = run(capsys, "convert", path, tmp_path / f"{family}.safetensors", *to)
        assert code == expected
        assert ("layers are those of sdxl, not of sd" in err) == expected


def test_inspect_says_what_is_missing(capsys, tmp_path):
    path, _, _ = official_sdxl(tmp_path)
    (tmp_path / "logs" / "hparams.yml").unlink()
    code, out, err = run(capsys, "inspect", path)
    assert code == 0
    assert "6 in 16 layers" in out or "6 in " in out
    assert "schedule:    unknown" in out
    assert "doesn't say rank_schedule" in err
    adapter = families.adapter("sd", ["to_q"])
    path = foreign.save(tmp_path / "l.safetensors", foreign.lycoris(adapter))
    code, out, err = run(capsys, "inspect", path)
    assert code == 0
    assert "lycoris" in out
    assert "frozen factors are not in the file" in err


def test_inspect_of_a_layer_that_is_not_finite_says_so(capsys, file):
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("lora_lambda.weight"))
    tensors[key] = torch.full_like(tensors[key], float("nan"))
    save_file(tensors, file)
    report = json.loads(run(capsys, "inspect", file, "--json")[1])
    assert [layer["finite"] for layer in report["layers"].values()].count(False) == 1
    assert "warning: 1 layers have values that aren't finite" in run(capsys, "inspect", file)[2]
    for options in ([], ["--rank", 2]):
        code, _, err = run(capsys, "convert", file, file.parent / "out", "--to", "lora", *options)
        assert code == 1
        assert "error: Layer " in err
        assert "has values that are not finite" in err


def test_convert_there_and_back_keeps_every_bit(capsys, tmp_path, file):
    assert run(capsys, "convert", file, tmp_path / "p", "--to", "peft")[0] == 0
    families.assert_equal(read_adapter(tmp_path / "p"), read_adapter(file))
    code, out, _ = run(
        capsys, "convert", tmp_path / "p", tmp_path / "d", "--to", "diffusers", "--json"
    )
    assert code == 0
    families.assert_equal(read_adapter(json.loads(out)["path"]), read_adapter(file))


def test_convert_takes_facts_base_and_pickles(capsys, tmp_path):
    path, adapter, _ = official_flux(tmp_path / "flux")
    arguments = ["convert", path, tmp_path / "out", "--to", "diffusers"]
    assert "is a pickle" in run(capsys, *arguments)[2]
    code, _, err = run(capsys, *arguments, "--allow-pickle", "--min-rank", 2)
    assert code == 1
    assert "doesn't say rank_schedule" in err
    facts = ["--min-rank", 2, "--rank-schedule", "power"]
    code, _, err = run(capsys, *arguments, "--allow-pickle", *facts)
    assert code == 0
    assert "warning: 4 adapters of single blocks" in err
    families.assert_equal(read_adapter(tmp_path / "out"), adapter)
    path, adapter, arguments = sd_scripts(tmp_path / "sd")
    arguments["base"].save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text("{}")
    options = ["--to", "peft", "--base", tmp_path / "base"]
    assert run(capsys, "convert", path, tmp_path / "p", *options)[0] == 0
    families.assert_equal(read_adapter(tmp_path / "p"), adapter)


@pytest.mark.parametrize("to", ["lora", "kohya", "comfyui"])
def test_convert_to_plain_lora_prints_what_cutting_loses(capsys, tmp_path, file, to):
    target = tmp_path / f"{to}.safetensors"
    code, out, _ = run(capsys, "convert", file, target, "--to", to, "--rank", 2)
    assert code == 0
    assert "cutting to rank 2 lost" in out
    ranks = {
        len(t) for name, t in load_file(target).items() if "lora_A" in name or "lora_down" in name
    }
    assert ranks == {2}


def test_convert_to_bands_writes_the_files_and_the_tables(capsys, tmp_path, file):
    options = ["--to", "comfyui", "--bands", 2]
    assert run(capsys, "convert", file, tmp_path / "bands", *options)[0] == 0
    names = {path.name for path in (tmp_path / "bands").iterdir()}
    assert names == {"bands_00.safetensors", "bands_01.safetensors", "bands.json", "workflow.json"}


def test_convert_says_how_many_bands_a_constant_schedule_has(capsys, tmp_path):
    adapter = families.adapter("sd", ["to_q"], rank_schedule="constant")
    file = write_diffusers(adapter, tmp_path / "a.safetensors")
    options = ["--to", "lora", "--bands", 4, "--json"]
    _, out, _ = run(capsys, "convert", file, tmp_path / "bands", *options)
    assert json.loads(out)["bands"] == 1


@pytest.mark.parametrize("place", ["pytorch_lora_weights.safetensors", "."])
def test_plain_lora_does_not_replace_the_file_that_it_is_made_of_raises(capsys, tmp_path, place):
    write_diffusers(families.adapter("sd", ["to_q"]), tmp_path)
    code, _, err = run(capsys, "convert", tmp_path, tmp_path / place, "--to", "lora")
    assert code == 2
    assert "would replace the T-LoRA file" in err
    assert read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--to", "peft", "--timestep", "5"], 2, "--timestep is for plain LoRA"),
        (["--to", "lora", "--bands", "2", "--rank", "4"], 2, "--bands chooses"),
        (["--to", "lora", "--shift", "2"], 2, "--shift is for --bands"),
        (["--to", "nonsense"], 2, "invalid choice"),
        (["--to", "peft", "--min-rank", "3"], 1, "min_rank was given, but a.safetensors is of the"),
        (["--to", "lora", "--timestep", "nan"], 1, "timestep must lie in the range"),
        (["--to", "lora", "--timestep", "5000"], 1, "timestep must lie in the range"),
        (["--to", "lora", "--bands", "1001"], 1, "must lie in [1, 1000], got 1001"),
        (["--to", "lora", "--rank", "0"], 1, "rank must be at least 1"),
        (["--to", "peft", "--base", "nowhere"], 1, "There is no file nowhere"),
    ],
)
def test_options_without_effect_or_sense_raises(capsys, tmp_path, file, options, code, message):
    found, _, err = run(capsys, "convert", file, tmp_path / "out", *options)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_an_error_without_a_traceback(capsys, tmp_path):
    for command in (["inspect"], ["convert", "--to", "peft"]):
        (tmp_path / "x.safetensors").write_text("nothing")
        rest = [tmp_path / "out"] if command[0] == "convert" else []
        code, _, err = run(capsys, *command, tmp_path / "x.safetensors", *rest)
        assert code == 1
        assert err.startswith("error: ")


def test_a_place_that_cannot_be_written_is_an_error_without_a_traceback(capsys, tmp_path, file):
    (tmp_path / "taken").write_text("a file")
    for to, place in (("peft", "taken"), ("lora", "taken/a.safetensors")):
        code, _, err = run(capsys, "convert", file, tmp_path / place, "--to", to)
        assert code == 1
        assert "error: " in err
    assert (tmp_path / "taken").read_text() == "a file"


def test_schedule_shows_where_ranks_switch_on(capsys):
    code, out, _ = run(capsys, "schedule", "--rank", 8, "--min-rank", 4, "--json")
    assert code == 0
    changes = json.loads(out)["changes"]
    assert [change["rank"] for change in changes] == [4, 5, 6, 7, 8]
    assert [change["timestep"] for change in changes] == pytest.approx([1000, 750, 500, 250, 0])


@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
def test_schedule_follows_a_flow_matching_shift_and_the_models_unit(capsys, shift):
    arguments = ["--rank", 16, "--num-train-timesteps", 1, "--steps", 8, "--json"]
    arguments += [] if shift is None else ["--shift", shift]
    name = "FlowMatchEulerDiscreteScheduler"
    steps = json.loads(run(capsys, "schedule", "--scheduler", name, *arguments)[1])["steps"]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift or 1.0)
    scheduler.set_timesteps(8)
    expected = (scheduler.timesteps / 1000).tolist()
    assert [step["timestep"] for step in steps] == pytest.approx(expected)
    ranks = [active_rank(t, 16, num_train_timesteps=1.0) for t in expected]
    assert [step["rank"] for step in steps] == ranks


def test_schedule_reads_an_adapter_and_the_folder_of_a_pipeline_and_draws(capsys, tmp_path, file):
    DDIMScheduler(timestep_spacing="trailing").save_pretrained(tmp_path / "scheduler")
    options = [
        "--adapter",
        file,
        "--scheduler",
        tmp_path,
        "--steps",
        4,
        "--plot",
        tmp_path / "s.png",
    ]
    code, out, _ = run(capsys, "schedule", *options)
    assert code == 0
    assert [line.split()[3] for line in out.splitlines()[2:6]] == ["2", "3", "4", "5"]
    with Image.open(tmp_path / "s.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("RGB").get_flattened_data())) > 3


def test_schedule_takes_what_another_trainers_file_needs(capsys, tmp_path):
    """It used to ask for options that it didn't have."""
    path, _, _ = official_flux(tmp_path)
    options = ["--allow-pickle", "--min-rank", 2, "--rank-schedule", "power"]
    code, out, _ = run(capsys, "schedule", "--adapter", path, *options)
    assert code == 0
    assert out.startswith("rank 2 to 6 of ")
    path, _, arguments = sd_scripts(tmp_path)
    arguments["base"].save_pretrained(tmp_path / "base")
    code, out, _ = run(capsys, "schedule", "--adapter", path, "--base", tmp_path / "base")
    assert code == 0
    assert "num_train_timesteps=1000" in out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--base", "models"], 2, "options of a file need --adapter"),
        (["--adapter", "a", "--rank", "3"], 2, "leave the other fields out"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler", "--shift", "0"], 1, "above 0, got 0"),
        (["--min-rank", "99"], 2, "min_rank=99"),
        (["--steps", "3"], 2, "need a --scheduler"),
        (["--scheduler", "Nothing"], 1, "is no scheduler of diffusers"),
        (["--scheduler", "DDIMScheduler", "--shift", "3"], 1, "DDIMScheduler has no shift"),
    ],
)
def test_schedules_that_make_no_sense_raises(capsys, options, code, message):
    found, _, err = run(capsys, "schedule", *options)
    assert found == code
    assert message in err


@pytest.fixture
def trained(tmp_path):
    """A file with trained tensors alone, the file of the whole adapter, and the config's folder."""
    model = families.adapted("sd", r".*(to_q|attn2\.to_k)", use_rslora=True, init_seed=3)
    model.peft_config["toy"].save_pretrained(tmp_path / "config")
    families.model("sd").save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text("{}")
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    path = foreign.save(tmp_path / "trained.safetensors", tensors)
    whole = write_diffusers(families.adapter_of(model), tmp_path / "whole.safetensors")
    return path, whole, ["--config", tmp_path / "config"], ["--base", tmp_path / "base"]


def test_trained_tensors_and_their_config_become_the_whole_adapters_file(capsys, tmp_path, trained):
    path, whole, config, base = trained
    target = tmp_path / "out.safetensors"
    code, _, err = run(capsys, "convert", path, target, "--to", "diffusers", *config, *base)
    assert (code, err) == (0, "")
    assert target.read_bytes() == whole.read_bytes()
    values = json.loads((tmp_path / "config" / "adapter_config.json").read_text())
    said = {"num_train_timesteps": 1000, "timestep_reversed": False, "timestep_type": "linear"}
    (tmp_path / "c.json").write_text(json.dumps(values | said))
    config = ["--config", tmp_path / "c.json"]
    code, _, err = run(capsys, "convert", path, tmp_path / "p", "--to", "peft", *config)
    assert code == 0
    assert "warning: The start is made from the names of the layers in the file" in err
    found, expected = read_adapter(tmp_path / "p"), read_adapter(whole)
    for name, layer in expected.layers.items():
        assert found.layers[name].recipe == layer.recipe
        assert found.layers[name].schedule.timestep_type == "linear"


def test_inspect_and_schedule_take_the_config_of_trained_tensors(capsys, trained):
    path, whole, config, base = trained
    report, expected = (
        json.loads(run(capsys, "inspect", file, "--json", *options)[1])
        for file, options in ((path, config + base), (whole, []))
    )
    assert (report["format"], expected["format"]) == ("state_dict", "diffusers")
    for name in ("layers", "schedule", "family", "ranks", "lora_alpha", "warnings"):
        assert report[name] == expected[name]
    one, other = (
        run(capsys, "schedule", "--adapter", file, *options)
        for file, options in ((path, config + base), (whole, []))
    )
    assert one == other
    assert one[0] == 0


def test_trained_tensors_without_what_they_need_raises(capsys, tmp_path, file, trained):
    path, _, config, base = trained
    commands = {
        "convert": ["convert", path, tmp_path / "out", "--to", "peft"],
        "inspect": ["inspect", path],
        "schedule": ["schedule", "--adapter", path],
    }
    for command in commands.values():
        code, _, err = run(capsys, *command, *base)
        assert code == 1
        assert "trained tensors of a T-LoRA adapter alone" in err
        code, _, err = run(capsys, *command, *config)
        assert code == 1
        assert "doesn't say num_train_timesteps and timestep_reversed" in err
        code, _, err = run(capsys, *command, "--config", tmp_path / "nothing.json")
        assert code == 1
        assert "There is no file" in err
    code, _, err = run(capsys, "convert", file, tmp_path / "out", "--to", "peft", *config)
    assert code == 1
    assert "config was given, but a.safetensors is of the file of diffusers" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, "schedule", *config)
    assert code == 2
    assert "options of a file need --adapter" in err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"peft_tlora {peft_tlora.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--min-rnk", "1", "x.py"), "unknown: --min-rnk"),
        (("run", "--min-rank", "50%", "x.py"), "'50%' is neither a rank such as 8 nor a fraction"),
        (("run",), "which script"),
    ],
)
def test_a_mistyped_command_says_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_options_behind_the_script_are_said_to_go_to_it(capsys, tmp_path):
    (tmp_path / "train.py").write_text("")
    assert run(capsys, "run", tmp_path / "train.py", "--min-rank=1", "--help")[0] == 1
    main(["run", str(tmp_path / "train.py"), "--min-rank=1"])
    assert "--min-rank stands behind the script" in capsys.readouterr().err


def test_plain_lora_is_told_to_be_plain(capsys, tmp_path):
    tensors = {
        "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 8),
        "unet.down_blocks.0.attentions.0.to_q.lora_B.weight": torch.zeros(8, 4),
    }
    path = foreign.save(tmp_path / "lora.safetensors", tensors)
    for command in (("inspect", path), ("convert", path, tmp_path / "x", "--to", "diffusers")):
        code, _, err = run(capsys, *command)
        assert code == 1
        assert "plain LoRA" in err
    kohya = {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in tensors.items()
    }
    code, _, err = run(capsys, "inspect", foreign.save(tmp_path / "k.safetensors", kohya))
    assert "k.safetensors is plain LoRA" in err


def test_converting_without_a_timestep_says_that_all_ranks_act(capsys, tmp_path, file):
    target = tmp_path / "plain.safetensors"
    err = run(capsys, "convert", file, target, "--to", "lora")[2]
    assert "warning: all ranks at every timestep" in err
    assert not run(capsys, "convert", file, target, "--to", "lora", "--timestep", "5")[2]


def test_alpha_and_the_scale_that_comes_of_it_are_told(capsys, tmp_path):
    model = families.adapted("sd", ["to_q"], lora_alpha=2)
    path = foreign.save(tmp_path / "a.safetensors", get_peft_model_state_dict(model, None, "toy"))
    assert "2, scale 0.333333, not the authors' 1" in run(capsys, "inspect", path)[1]
