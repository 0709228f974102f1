"""Bands of timesteps: K plain LoRAs in the place of a mask that moves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from peft_tlora.formats.adapter import Adapter
from peft_tlora.formats.bands import split_bands, write_bands
from peft_tlora.formats.sampling import BetaSampling, EDMSampling, FlowSampling
from peft_tlora.schedule import RankSchedule

from .conftest import crash_after, crash_while_moving
from .tiny import families

SCHEDULES = {
    "power": RankSchedule(16, 8),
    "exponent": RankSchedule(16, 4, schedule_exponent=2.0),
    "cosine": RankSchedule(12, 0, rank_schedule="cosine", schedule_exponent=0.5),
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
        mask = schedule.active_rank(schedule.timestep_at(band.mask_noise))
        assert mask == schedule.active_rank(schedule.timestep_at(noise)), noise


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
        mask = schedule.active_rank(schedule.timestep_at(band.mask_noise))
        for noise in torch.linspace(band.noise[1] + 1e-6, band.noise[0], 50).tolist():
            off = abs(mask - schedule.active_rank(schedule.timestep_at(noise)))
            assert off <= math.ceil(8 / count / 2)


def test_a_constant_schedule_needs_one_band_and_none_raises():
    assert len(split_bands(RankSchedule(16, 8, rank_schedule="constant"), 5)) == 1
    with pytest.raises(ValueError, match=r"lie in \[1, 1000\], got 0"):
        split_bands(SCHEDULES["power"], 0)


@pytest.mark.parametrize("noise", [0.2, 0.5, 0.9])
def test_percents_of_a_flow_model_are_those_before_the_shift(noise):
    """ComfyUI: sigma = s x / (1 + (s - 1) x) at x = 1 - percent, for FLUX with s = e ** mu."""
    x = 1 - FlowSampling(3.0).percent(noise)
    assert 3 * x / (1 + 2 * x) == pytest.approx(noise)
    mu = 1.15
    x = 1 - FlowSampling(math.exp(mu)).percent(noise)
    assert math.exp(mu) / (math.exp(mu) + (1 / x - 1)) == pytest.approx(noise)


def sigmas_of_betas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    return ((1 - alphas) / alphas).sqrt()


@pytest.mark.parametrize("edge", [125, 500, 875, 999])
def test_a_band_of_a_model_with_betas_begins_where_a_sigma_is_rounded_to_its_first_timestep(edge):
    table = sigmas_of_betas()
    sampling = BetaSampling()
    sigma, t = sampling.sigma(edge / 1000), 999 * (1 - sampling.percent(edge / 1000))
    above = min(edge + 1, 999)
    assert table[edge] - 1e-9 <= sigma <= table[above] + 1e-9
    assert t == pytest.approx(min(edge + 0.5, 999))
    assert sigma == pytest.approx(float((table[edge] * table[above]).sqrt()))
    assert (sampling.sigma(0.0), sampling.percent(0.0)) == (0, 1)
    assert sampling.sigma(1.0) == pytest.approx(14.6146, abs=1e-4)  # ComfyUI's sigma_max


def test_bands_of_log_sigma_need_the_range_of_sigmas_and_have_percents_in_it(tmp_path):
    adapter = families.adapter("sd", ["to_q"], timestep_type="log_sigma")
    with pytest.raises(ValueError, match=r"pass sigma_range=.*--sigma-range"):
        write_bands(adapter, tmp_path, count=2, family="sd")
    with pytest.raises(ValueError, match="A shift is for flow models"):
        write_bands(adapter, tmp_path, count=2, family="sd", shift=3.0)
    with pytest.raises(ValueError, match="0 < smallest < largest"):
        write_bands(adapter, tmp_path, count=2, family="sd", sigma_range=(80.0, 0.002))
    assert not list(tmp_path.iterdir())
    for timestep_type in ("log_sigma", None):
        adapter = families.adapter("sd", ["to_q"], timestep_type=timestep_type)
        write_bands(adapter, tmp_path, count=2, family="sd", sigma_range=(0.002, 80.0))
        content = json.loads((tmp_path / "bands.json").read_text())
        assert content["sampling"] == {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0}
        first, second = content["bands"]
        assert first["sigma"] == [80, 1]  # half of x0 + sigma noise is noise at sigma 1
        assert second["sigma"] == [1, 0]
        assert first["timestep"][1] == pytest.approx(0)
        assert first["rank"] == 3
        percent = first["percent"][1]  # ComfyUI's is linear in ln(sigma)
        log = math.log(80) + percent * (math.log(0.002) - math.log(80))
        assert log == pytest.approx(0, abs=1e-12)
    assert EDMSampling(0.002, 80.0).percent(0.0) == 1


def test_a_flow_model_without_a_shift_and_a_range_without_logarithms_raises(tmp_path):
    with pytest.raises(ValueError, match=r"sd3 is a flow model.*--shift"):
        write_bands(families.adapter("sd3", ["to_q"]), tmp_path, count=2, family="sd3")
    adapter = families.adapter("sd", ["to_q"], timestep_type="linear")
    with pytest.raises(ValueError, match="timestep_type='linear'"):
        write_bands(adapter, tmp_path, count=2, family="sd", sigma_range=(0.002, 80.0))
    assert not list(tmp_path.iterdir())


def test_where_the_sampling_cannot_be_told_there_are_timesteps_only(tmp_path):
    (tmp_path / "workflow.json").write_text("of an earlier export")
    write_bands(families.adapter("wan", ["to_q"]), tmp_path, count=2, to="lora")
    content = json.loads((tmp_path / "bands.json").read_text())
    assert content["sampling"] is None
    assert all({"percent", "sigma"}.isdisjoint(band) for band in content["bands"])
    assert not (tmp_path / "workflow.json").exists()


def test_band_files_of_an_earlier_export_with_more_bands_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "bands"
    adapter = families.adapter("sd", ["to_q"])
    write_bands(adapter, folder, count=4, family="sd")
    content = json.loads((folder / "bands.json").read_text())
    content["bands"] += [{"file": name} for name in ("../other.safetensors", "own.safetensors")]
    (folder / "bands.json").write_text(json.dumps(content))
    kept = [folder / "own.safetensors", folder / "bands_99.safetensors"]
    kept.append(tmp_path / "other.safetensors")
    for path in kept:
        path.write_text("the user's")
    write_bands(adapter, folder, count=2, family="sd")
    assert sorted(path.name for path in folder.glob("bands_*")) == [
        "bands_00.safetensors",
        "bands_01.safetensors",
        "bands_99.safetensors",
    ]
    assert all(path.exists() for path in kept)
    (folder / "bands.json").write_text("[" * 100_000)
    write_bands(adapter, folder, count=1, family="sd")
    assert (folder / "bands_01.safetensors").exists()  # no list says that it is an earlier export's


@pytest.mark.parametrize("written", range(5))
def test_a_crash_while_bands_are_written_leaves_the_old_ones_alone(tmp_path, monkeypatch, written):
    write_bands(families.adapter("sd", ["to_q"]), tmp_path, count=3, family="sd")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    crash_after(monkeypatch, written)
    with pytest.raises(RuntimeError, match="power cut"):
        write_bands(families.adapter("sd", ["to_k"]), tmp_path, count=3, family="sd")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_crash_while_bands_take_their_places_leaves_no_list_of_a_mixture(tmp_path, monkeypatch):
    write_bands(families.adapter("sd", ["to_q"]), tmp_path, count=3, family="sd")
    crash_while_moving(monkeypatch, f"{tmp_path.name}_01.safetensors")
    with pytest.raises(RuntimeError, match="power cut"):
        write_bands(families.adapter("sd", ["to_k"]), tmp_path, count=3, family="sd")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{tmp_path.name}_0{i}.safetensors" for i in range(3)
    }


def test_the_files_are_the_masks_and_the_tables_name_them(tmp_path):
    adapter = families.adapter("sd3", ["to_q"], r=6, min_rank=2)
    write_bands(adapter, tmp_path, count=2, family="sd3", shift=3.0)
    content = json.loads((tmp_path / "bands.json").read_text())
    assert content["sampling"] == {"kind": "flow", "shift": 3.0}
    bands = content["bands"]
    assert [band["rank"] for band in bands] == [3, 5]
    assert [band["timestep"] for band in bands] == [[1000, 500], [500, 0]]
    assert [band["sigma"] for band in bands] == [[1, 0.5], [0.5, 0]]
    assert [band["percent"] for band in bands] == [[0, 0.75], [0.75, 1]]
    name, layer = next(iter(adapter.layers.items()))
    for band in bands:
        tensors = load_file(tmp_path / band["file"])
        up, down = (tensors[f"transformer.{name}.lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(up @ down, layer.delta(band["rank"]))


def keyframes(nodes, link):
    """(percent, strength, steps that it lasts at least) of a chain of nodes, the earliest first."""
    inputs = nodes[link[0]]["inputs"]
    if nodes[link[0]]["class_type"] == "CreateHookKeyframesInterpolated":
        assert (inputs["interpolation"], inputs["keyframes_count"]) == ("linear", 2)
        start, end = inputs["start_percent"], inputs["end_percent"]
        return [(start, inputs["strength_start"], 1), (end, inputs["strength_end"], 0)]
    before = keyframes(nodes, inputs["prev_hook_kf"]) if "prev_hook_kf" in inputs else []
    return [*before, (inputs["start_percent"], inputs["strength_mult"], 1)]


def strengths(frames, sigmas, sigma_at):
    """The strength at each step, by ComfyUI's rule.

    The next keyframes whose sigma is reached follow, up to one that has to last for steps, unless
    the present one has still to last; one that began before the sampling has not.
    """
    begins = [sigma_at(percent) for percent, *_ in frames]
    lasts = [
        0 if begin > sigmas[0] else frame[2] for begin, frame in zip(begins, frames, strict=True)
    ]
    now, used, found = 0, 0, []
    for sigma in sigmas:
        if used >= lasts[now]:
            for i in range(now + 1, len(frames)):
                if begins[i] < sigma:
                    break
                now, used = i, 0
                if lasts[i]:
                    break
        used += 1
        found.append(frames[now][1])
    return found


def sampled(family):
    """The shift, all sigmas of a model and ComfyUI's sigma at a percent."""
    if family == "sd":
        table = sigmas_of_betas()

        def sigma_at(percent):
            t = 999 * (1 - percent)
            low, high = table[int(t)].log(), table[min(int(t) + 1, 999)].log()
            return 1e9 if percent <= 0 else float((low + (t % 1) * (high - low)).exp())

        return None, table, sigma_at
    x = torch.arange(1, 1001, dtype=torch.float32) / 1000
    shift = {"sd3": 3.0, "wan": 8.0}[family]
    return (
        shift,
        shift * x / (1 + (shift - 1) * x),
        lambda p: shift * (1 - p) / (1 + (shift - 1) * (1 - p)),
    )


@pytest.mark.parametrize("steps", [2, 4, 20, 25])
@pytest.mark.parametrize("family", ["sd", "sd3", "wan"])
def test_at_each_step_the_workflow_has_one_file_on_and_it_is_the_mask_of_the_step(
    tmp_path, family, steps
):
    """Steps skip bands, some are on an edge: files once were on together, or one step late."""
    shift, table, sigma_at = sampled(family)
    adapter = families.adapter(family, ["to_q"], r=8, min_rank=4)
    write_bands(adapter, tmp_path, count=4, family=family, shift=shift)
    nodes = json.loads((tmp_path / "workflow.json").read_text())
    ranks = {
        b["file"]: b["rank"] for b in json.loads((tmp_path / "bands.json").read_text())["bands"]
    }
    picked = [999 - int(i * 1000 / steps) for i in range(steps)]
    sigmas = table[picked].tolist()
    on = [[] for _ in range(steps)]
    for node in nodes.values():
        if node["class_type"] == "SetHookKeyframes":
            lora = nodes[node["inputs"]["hooks"][0]]
            assert lora["class_type"] == "CreateHookLoraModelOnly"
            frames = keyframes(nodes, node["inputs"]["hook_kf"])
            for step, strength in enumerate(strengths(frames, sigmas, sigma_at)):
                if strength:
                    assert strength == 1
                    on[step].append(ranks[lora["inputs"]["lora_name"]])
    schedule = next(iter(adapter.layers.values())).schedule
    t = picked if family == "sd" else [round(1000 * sigma, 3) for sigma in sigmas]
    assert on == [[schedule.active_rank(float(t[step]))] for step in range(steps)]
    last = nodes[str(len(nodes))]
    assert last["class_type"] == "PairConditioningSetProperties"
    assert nodes[last["inputs"]["hooks"][0]]["class_type"] == "CombineHooks2"


def test_schedules_that_differ_have_no_common_bands_raises(tmp_path):
    one, other = (families.adapter("sd", ["to_q"], min_rank=2, schedule_exponent=x) for x in (1, 2))
    layers = list(zip(one.layers.items(), other.layers.items(), strict=True))
    mixed = dict(pair[i % 2] for i, pair in enumerate(layers))
    with pytest.raises(ValueError, match="no common bands"):
        write_bands(Adapter("unet", mixed), tmp_path, count=2, family="sd")
