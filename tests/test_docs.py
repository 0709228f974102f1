"""The documentation runs, and it names what is exported."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import peft_tlora
from peft_tlora.cli import main
from peft_tlora.timestep import denoisers
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser

from . import trainers
from .tiny import families

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_documentation_runs(block, tmp_path, monkeypatch):
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(denoisers, "DENOISERS", dict(DENOISERS))
    exec(block, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_commands_between_formats_run_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in ("sdxl", "flux", "wan"):
        families.model(family).save_pretrained(f"models/{family}")
    FlowMatchEulerDiscreteScheduler().save_pretrained("models/flux/scheduler")
    trainers.official_sdxl(Path("out/checkpoint-800"))
    path, _, _ = trainers.official_flux(Path("out/checkpoint-500"))
    (path.parent / "logs").mkdir()
    (path.parent / "logs" / "hparams.yml").write_text("tlora: true\nmin_rank: 2\n")
    trainers.sd_scripts(Path("a"), "sdxl")[0].rename("toy.safetensors")
    trainers.takenoko(Path("b"))[0].rename("wan.safetensors")
    trainers.lycoris(Path("c"), "sdxl", num_train_timesteps=1000)[0].rename("lycoris.safetensors")
    page = (ROOT / "docs" / "interoperability.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    peft-tlora (.*)", page, re.M)
    assert len(commands) > 10
    for command in commands:  # the tiny files have 6 ranks at most
        assert main(shlex.split(command.replace("--min-rank 8", "--min-rank 2"))) == 0, command
    assert Path("schedule.png").exists()


def test_every_public_name_is_documented():
    api = (ROOT / "docs" / "api.md").read_text()
    for name in peft_tlora.__all__:
        assert f"::: peft_tlora.{name}\n" in api or f"`peft_tlora.{name}`" in api, name
    assert "::: peft_tlora.formats\n" in api  # with what its __all__ has


def test_every_known_denoiser_is_documented_as_it_is():
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| ([\w:]+) \| (\S+) \| ([^|]+) \| ([^|]*)\|", page, re.M)
    documented = {name: [value.strip() for value in values] for name, *values in rows[1:]}
    known = {k: v for k, v in DENOISERS.items() if not k.startswith(("tests:", "torch:"))}
    assert documented.keys() == known.keys()
    default = SimpleNamespace(config=SimpleNamespace())
    for name, entry in known.items():
        assert entry is not None
        denoiser = entry if isinstance(entry, Denoiser) else entry(default)
        ends = ["0", f"{denoiser.num_train_timesteps:g}"]
        if not denoiser.timestep_reversed:
            ends.reverse()
        if denoiser.timestep_type == "log_sigma":
            ends = ["0.25 ln(sigma)", ""]
        expected = ["-"] * 3 if denoiser.argument is None else [f"`{denoiser.argument}`", *ends]
        assert documented[name] == expected


def test_the_changelog_knows_the_version():
    assert f"## {peft_tlora.__version__}" in (ROOT / "CHANGELOG.md").read_text()
