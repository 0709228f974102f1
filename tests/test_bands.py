"""Bands of timesteps: K plain LoRAs in the place of a mask that moves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from peft_tlora.formats.bands import percent_at, split_bands, timestep_at, write_bands
from peft_tlora.schedule import RankSchedule

from .tiny import families

SCHEDULES = {
    "power": RankSchedule(16, 8),
    "exponent": RankSchedule(16, 4, exponent=2.0),
    "cosine": RankSchedule(12, 0, kind="cosine", exponent=0.5),
    "reversed": RankSchedule(16, 8, num_train_timesteps=1.0, timestep_reversed=True),
    "log sigma": RankSchedule(16, 8, timestep_type="log_sigma"),
    "groups": RankSchedule(16, 8, rank_multiple=2),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_with_a_band_for_each_rank_every_timestep_has_its_own_mask(schedule):
    bands = split_bands(schedule, (schedule.r - schedule.r_min) // schedule.rank_multiple)
    noises = [(i + 0.5) / 500 for i in range(500)]
    for noise in noises:
        band = next(b for b in bands if b.noise[0] >= noise > b.noise[1])
        mask = schedule.active_rank(timestep_at(schedule, band.mask_noise))
        assert mask == schedule.active_rank(timestep_at(schedule, noise)), noise


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_bands_cover_all_noises_and_are_off_by_half_a_band_at_most(count):
    schedule = SCHEDULES["power"]
    bands = split_bands(schedule, count)
    edges = [band.noise[0] for band in bands] + [bands[-1].noise[1]]
    assert edges[0] == 1
    assert edges[-1] == 0
    assert edges == sorted(edges, reverse=True)
    assert [b.noise[1] for b in bands[:-1]] == edges[1:-1]
    for band in bands:
        mask = schedule.active_rank(timestep_at(schedule, band.mask_noise))
        for noise in torch.linspace(band.noise[1] + 1e-6, band.noise[0], 50).tolist():
            off = abs(mask - schedule.active_rank(timestep_at(schedule, noise)))
            assert off <= math.ceil(8 / count / 2)


def test_a_constant_schedule_needs_one_band_and_none_raises():
    assert len(split_bands(RankSchedule(16, 8, kind="constant"), 5)) == 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        split_bands(SCHEDULES["power"], 0)


@pytest.mark.parametrize("noise", [0.2, 0.5, 0.9])
def test_percents_of_a_flow_model_are_those_before_the_shift(noise):
    """ComfyUI: sigma = s x / (1 + (s - 1) x) at x = 1 - percent, for FLUX with s = e ** mu."""
    x = 1 - percent_at(noise, 3.0)
    assert 3 * x / (1 + 2 * x) == pytest.approx(noise)
    mu = 1.15
    x = 1 - percent_at(noise, math.exp(mu))
    assert math.exp(mu) / (math.exp(mu) + (1 / x - 1)) == pytest.approx(noise)
    assert percent_at(noise, None) == pytest.approx(1 - noise)


def test_the_files_are_the_masks_and_the_tables_name_them(tmp_path):
    adapter = families.adapter("sd3", ["to_q"], r=6, min_rank=2)
    write_bands(adapter, tmp_path, count=2, family="sd3", shift=3.0)
    bands = json.loads((tmp_path / "bands.json").read_text())["bands"]
    assert [band["rank"] for band in bands] == [3, 5]
    assert [band["timestep"] for band in bands] == [[1000, 500], [500, 0]]
    assert [band["sigma"] for band in bands] == [[1, 0.5], [0.5, 0]]
    assert [band["percent"] for band in bands] == [[0, 0.75], [0.75, 1]]
    name, layer = next(iter(adapter.layers.items()))
    for band in bands:
        tensors = load_file(tmp_path / band["file"])
        up, down = (tensors[f"transformer.{name}.lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(up @ down, layer.delta(band["rank"]))


def test_the_workflow_switches_each_file_on_and_off_at_its_percents(tmp_path):
    adapter = families.adapter("sd", ["to_q"])
    write_bands(adapter, tmp_path, count=3, family="sd")
    nodes = json.loads((tmp_path / "workflow.json").read_text())
    bands = json.loads((tmp_path / "bands.json").read_text())["bands"]

    def strengths(link):
        """(percent, strength) of a chain of keyframes, the earliest first."""
        inputs = nodes[link[0]]["inputs"]
        before = strengths(inputs["prev_hook_kf"]) if "prev_hook_kf" in inputs else []
        return [*before, (inputs["start_percent"], inputs["strength_mult"])]

    found = {}
    for node in nodes.values():
        if node["class_type"] == "SetHookKeyframes":
            lora = nodes[node["inputs"]["hooks"][0]]
            assert lora["class_type"] == "CreateHookLoraModelOnly"
            found[lora["inputs"]["lora_name"]] = strengths(node["inputs"]["hook_kf"])
    first, second, third = (band["file"] for band in bands)
    a, b = bands[0]["percent"][1], bands[1]["percent"][1]
    assert found[first] == [(0, 1), (a, 0)]
    assert found[second] == [(0, 0), (a, 1), (b, 0)]
    assert found[third] == [(0, 0), (b, 1)]
    last = nodes[str(len(nodes))]
    assert last["class_type"] == "PairConditioningSetProperties"
    assert nodes[last["inputs"]["hooks"][0]]["class_type"] == "CombineHooks2"


def test_schedules_that_differ_have_no_common_bands_raises(tmp_path):
    one, other = (families.adapter("sd", ["to_q"], min_rank=2, schedule_exponent=x) for x in (1, 2))
    layers = list(zip(one.layers.items(), other.layers.items(), strict=True))
    mixed = dict(pair[i % 2] for i, pair in enumerate(layers))
    with pytest.raises(ValueError, match="no common bands"):
        write_bands(type(one)("unet", mixed), tmp_path, count=2, family="sd")
