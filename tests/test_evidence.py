"""The single-image benchmark: its concepts, measures, arms and runner."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence import decided, encoder, metrics, plan, runner, store, training, trial
from evidence.arms import ARMS, BANDS, CORE
from evidence.concepts import (
    CONCEPTS,
    SPLITS,
    TEST,
    TUNING,
    asked_settings,
    draw,
    parts,
    training_setting,
)
from PIL import Image
from toybox import odd, scenes
from toybox.check import palette_map

from .conftest import tiny_unet


def random_pictures(count):
    rng = np.random.default_rng(0)
    shape = (scenes.SIZE, scenes.SIZE, 3)
    return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(count)]


def true_pictures():
    for concept in CONCEPTS.values():
        for setting in asked_settings(concept, 8):
            yield concept, setting, draw(concept, setting)


def test_splits_are_disjoint_in_shape_and_none_is_known_to_the_base():
    tuning, test = ({concept.outline for concept in split} for split in (TUNING, TEST))
    assert (len(TUNING), len(TEST)) == (4, 8)
    assert len(tuning | test) == len(CONCEPTS) == 12
    assert not (tuning | test) & set(scenes.OUTLINES)


def outline(mask):
    """A silhouette stretched to the same square, to compare shapes at any place and size."""
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    small = Image.fromarray((box * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BOX)
    return np.asarray(small) > 127


def test_no_odd_toy_of_the_base_has_the_outline_of_a_test_concept():
    known = [outline(parts(concept).sum(0) > 0.5) for concept in TEST]
    for i in range(300):
        shape = outline(odd.odd_masks(odd.sample_odd_scene(0, i)).sum(0) > 0.5)
        assert max((shape & other).sum() / (shape | other).sum() for other in known) < 0.92


def test_no_two_concepts_look_alike():
    masks = [parts(concept).sum(0) > 0.5 for concept in CONCEPTS.values()]
    overlaps = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlaps) < 0.85


@pytest.mark.parametrize("concept", CONCEPTS.values(), ids=lambda concept: concept.name)
def test_asked_settings_share_no_background_with_the_training_picture(concept):
    seen, asked = training_setting(concept), asked_settings(concept, 8)
    assert len(set(asked)) == 8
    for setting in asked:
        assert setting.background not in (seen.background, concept.colour, concept.second)
        assert setting.texture != seen.texture
    assert [setting.position == seen.position for setting in asked] == [False, True] * 4


def test_checker_reads_everything_of_true_pictures():
    measured = [
        metrics.measure(picture, concept, setting, training_setting(concept))
        for concept, setting, picture in true_pictures()
    ]
    for name in ("identity", "alignment"):
        assert {row[name] for row in measured} == {1.0}
    assert min(row["overlap"] for row in measured) > 0.85
    assert max(row["rmse"] for row in measured) < 0.01
    assert {row["leak_background"] for row in measured} == {0.0}


def test_checker_finds_no_concept_in_random_pictures():
    concept = TEST[0]
    for picture in random_pictures(20):
        row = metrics.measure(picture, concept, None, training_setting(concept))
        assert row["overlap"] < metrics.FOUND
        assert row["identity"] == 0.0
        assert row["rmse"] > 0.2
        assert "alignment" not in row


def test_leakage_and_alignment_of_the_given_picture_are_at_their_worst():
    for concept in TEST:
        seen, asked = training_setting(concept), asked_settings(concept, 1)[0]
        row = metrics.measure(draw(concept, seen), concept, asked, seen)
        assert (row["leakage"], row["alignment"], row["identity"]) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("concept", CONCEPTS.values(), ids=lambda concept: concept.name)
def test_a_concept_with_exchanged_colours_is_not_identified(concept):
    decoy = replace(concept, colour=concept.second, second=concept.colour)
    picture = draw(decoy, asked_settings(concept, 1)[0])
    assert not metrics.is_identified(palette_map(picture), concept)


def test_a_background_in_a_colour_of_the_concept_does_not_pass_for_it():
    concept = TEST[0]
    plain = Image.new("RGB", (scenes.SIZE,) * 2, scenes.PALETTE[concept.colour][0])
    assert metrics.match(palette_map(plain), concept).overlap < metrics.FOUND


def test_encoder_reads_scenes_it_was_not_trained_on():
    rates = encoder.accuracy(encoder.load(), range(10**6, 10**6 + 200))
    assert min(rates.values()) > 0.75
    assert rates["background"] > 0.95


def test_encoder_tells_the_true_object_from_others():
    cuts = {}
    for concept in TEST:
        picture = draw(concept, asked_settings(concept, 1)[0])
        found = metrics.match(palette_map(picture), concept)
        cuts[concept] = encoder.embed([metrics.cut_out(picture, found, concept)])
    for concept in TEST:
        given = draw(concept, training_setting(concept))
        found = metrics.match(palette_map(given), concept)
        truth = encoder.embed([metrics.cut_out(given, found, concept)])
        likeness = {c: encoder.similarity(cut, truth).item() for c, cut in cuts.items()}
        assert max(likeness, key=likeness.__getitem__) == concept
        assert likeness[concept] > 0.98


def test_diversity_is_zero_for_one_picture_and_more_for_several():
    one, several = random_pictures(1) * 4, [picture for *_, picture in true_pictures()][:4]
    assert trial.diversity(encoder.embed(one)) == pytest.approx(0, abs=1e-6)
    assert trial.diversity(encoder.embed(several)) > 0.05


EXPECTED_RANKS = {
    "lora": (8, 8),
    "lora_mean": (6, 6),
    "lora_min": (4, 4),
    "vanilla": (4, 8),
    "ortho": (8, 8),
    "tlora": (4, 8),
    "reversed": (8, 4),
}


@pytest.mark.parametrize("name", CORE)
def test_arms_have_their_ranks_in_noise_and_without(name):
    unet = tiny_unet()
    training.attach(unet, ARMS[name], r=8, r_min=4, targets=["to_q"], seed=0)
    layer = next(m for m in unet.modules() if hasattr(m, "lora_A"))
    (config,) = unet.peft_config.values()
    if config.peft_type == "LORA":
        ranks = (config.r, config.r)
    else:
        ranks = tuple(_active_rank(layer, unet, t) for t in (1000, 0))
    assert ranks == EXPECTED_RANKS[name]


def _active_rank(layer, unet, timestep):
    from peft_tlora import timestep_context

    schedule = next(iter(layer.lora_variant.values())).ranks.schedule
    with timestep_context(unet, timestep):
        return int(torch.as_tensor(layer.timestep_state.current().active_rank(schedule)))


def step_inputs(batch=1):
    return torch.randn(batch, 4, 8, 8), {"encoder_hidden_states": torch.randn(batch, 4, 16)}


def fit(unet, band=(0.0, 1.0), checkpoints=(2, 4)):
    noising = training.noising_of(trial.fresh_pipeline("cpu").scheduler)
    torch.manual_seed(1)
    options = {"lr": 1e-3, "seed": 5, "checkpoints": checkpoints, "band": band}
    return training.fit(unet, *step_inputs(2), noising, **options)


@pytest.mark.parametrize("name", [*BANDS, "lora"])
def test_training_stays_in_its_band_of_timesteps(name):
    unet, seen, band = tiny_unet(), [], ARMS[name].trains
    training.attach(unet, ARMS[name], r=4, r_min=2, targets=["to_q"], seed=0)
    unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["timestep"].tolist()), with_kwargs=True
    )
    list(fit(unet, band, checkpoints=(40,)))
    assert len(seen) == 80
    assert min(seen) >= round(band[0] * 1000)
    assert max(seen) < round(band[1] * 1000)
    assert max(seen) - min(seen) > 0.8 * 1000 * (band[1] - band[0])


def test_training_pauses_at_checkpoints_and_depends_on_its_seed_alone():
    results = []
    for _ in range(2):
        unet = tiny_unet()
        training.attach(unet, ARMS["tlora"], r=4, r_min=2, targets=["to_q"], seed=3)
        torch.rand(1)
        results.append(list(fit(unet)))
    assert [step for step, _ in results[0]] == [2, 4]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("name", "trains", "acts"),
    [
        ("lora", (0, 1), (0, 1)),
        ("band_noisy", (2 / 3, 1), (2 / 3, 1)),
        ("trains_noisy", (2 / 3, 1), (0, 1)),
        ("acts_clean", (0, 1), (0, 1 / 3)),
    ],
)
def test_arms_train_and_act_each_in_their_band(name, trains, acts, monkeypatch):
    bands = []

    def watched(function, position=None):
        def call(*args, **options):
            bands.append(options["band"] if position is None else args[position])
            return function(*args, **options)

        return call

    monkeypatch.setitem(trial.SAMPLING, "steps", 1)
    monkeypatch.setattr(trial, "fit", watched(training.fit))
    monkeypatch.setattr(trial, "acting_in", watched(training.acting_in, position=1))
    list(trial.run(trial.Cell(name, TEST[0].name, 0, 4, 2, 1e-3, (1,))))
    assert bands == [trains, acts]


def test_adapter_of_a_band_acts_in_it_alone_and_is_on_again_afterwards():
    unet = tiny_unet()
    training.attach(unet, ARMS["band_noisy"], r=4, r_min=2, targets=["to_q"], seed=0)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            weight.data += 0.3
    latents, conditions = step_inputs()

    def outputs():
        with torch.no_grad():
            return [unet(latents, torch.tensor(t), **conditions).sample for t in (900, 300)]

    adapted = outputs()
    unet.disable_adapters()
    base = outputs()
    unet.enable_adapters()
    with training.acting_in(unet, (2 / 3, 1.0)):
        inside = outputs()
    assert torch.equal(inside[0], adapted[0])
    assert torch.equal(inside[1], base[1])
    assert not torch.allclose(adapted[1], base[1])
    assert torch.equal(outputs()[1], adapted[1])


CELL = trial.Cell("lora", TEST[0].name, 0, 16, 0, 1e-3, (5, 10))


def test_finished_trials_are_not_run_again(tmp_path):
    path, other = tmp_path / "results.jsonl", replace(CELL, seed=1)
    assert store.missing([CELL, other, CELL], store.load(path)) == [CELL, other]
    store.append(path, CELL, [(5, {"overlap": 0.123456}), (10, {"overlap": 0.2})])
    records = store.load(path)
    assert [(r["step"], r["overlap"]) for r in records] == [(5, 0.1235), (10, 0.2)]
    assert store.missing([CELL, other], records) == [other]
    longer = replace(CELL, steps=(5, 10, 20))
    assert store.missing([longer], records) == [longer]


def test_cells_run_once_and_leave_records_and_pictures(tmp_path, monkeypatch):
    ran = []

    def fake(cell, device):
        ran.append(cell)
        yield 5, {"overlap": 0.1}, {"asked": random_pictures(2), "free": random_pictures(1)}

    monkeypatch.setattr(runner, "run", fake)
    cell = replace(CELL, steps=(5,))
    for _ in range(2):
        runner.run_cells([cell], tmp_path, "cpu", "test")
    assert ran == [cell]
    assert [r["overlap"] for r in store.load(tmp_path / runner.RESULTS)] == [0.1]
    (sheet,) = (tmp_path / "pictures").iterdir()
    with Image.open(sheet) as pictures:
        assert pictures.width > 3 * scenes.SIZE


def test_cells_run_in_several_processes():
    assert sorted(runner.spread([-1, 2, -3], abs, 2)) == [1, 2, 3]


def test_a_line_cut_off_by_an_interruption_is_run_again(tmp_path):
    path = tmp_path / "results.jsonl"
    store.append(path, CELL, [(5, {}), (10, {})])
    whole = path.read_text()
    path.write_text(whole[:-10])
    assert store.missing([CELL], store.load(path)) == [CELL]
    store.append(path, replace(CELL, seed=1), [(5, {}), (10, {})])
    assert [record["seed"] for record in store.load(path)] == [0, 1, 1]


def test_a_broken_line_in_the_middle_raises(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"arm": \n' + json.dumps({"arm": "lora"}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        store.load(path)


def test_each_arm_is_tuned_with_the_same_budget_on_tuning_concepts():
    cells = plan.tuning_cells(plan.PLANS["full"])
    names = {concept.name for concept in SPLITS["tuning"]}
    assert {cell.concept for cell in cells} == names
    assert Counter(cell.arm for cell in cells) == dict.fromkeys(CORE, 16)
    assert {(c.r, c.r_min) for c in cells} == {(16, 0), (16, 8)}


def test_the_main_comparison_runs_first_and_the_first_rank_alone_has_every_minimum():
    full = plan.PLANS["full"]
    tuned = [
        {"arm": arm, "concept": TUNING[0].name, "lr": full.rates[0], "step": full.steps[0],
         "overlap": 0.5, "alignment": 0.5} for arm in CORE
    ]  # fmt: skip
    cells = plan.comparison_cells(full, tuned)
    main = len(CORE) * full.test * full.seeds
    after = [cell for cell in cells if cell.arm != "base"][main:]
    assert after[-1].arm in BANDS
    assert not {(c.r, c.r_min) for c in after} & {(16, 8)}
    found = {(c.r, c.r_min) for c in cells if c.arm == "tlora"}
    assert found == {(16, 8), (16, 4), (4, 2), (64, 32)}
    assert {c.r for c in cells if c.arm in BANDS} == {16}


def test_the_committed_results_have_every_trial_of_both_plans():
    path = Path(__file__).parents[1] / "benchmarks/results/evidence-full.jsonl"
    records = store.load(path)
    for name, chosen in plan.PLANS.items():
        cells = plan.comparison_cells(chosen, records) + plan.equal_rate_cells(chosen, records)
        assert not store.missing(cells + plan.tuning_cells(chosen), records), name
    assert path.stat().st_size < 5_000_000


def test_test_trials_take_the_rate_that_scored_best_in_tuning():
    small = replace(plan.PLANS["full"], arms=("lora",), ranks=(16,), test=1, seeds=1)
    records = [
        {"arm": "lora", "concept": name, "seed": 0, "r": 16, "r_min": 0, "lr": lr, "step": step,
         "overlap": overlap, "alignment": 0.5}
        for name, lr, step, overlap in [
            (TUNING[0].name, 1e-3, 100, 0.3), (TUNING[0].name, 2e-3, 50, 0.6),
            (TEST[0].name, 4e-3, 50, 0.9),  # a test concept must not decide
            (TUNING[0].name, 1.0, 50, 0.9),  # nor a rate of another plan
        ]
    ]  # fmt: skip
    assert plan.best_settings(records, small) == {"lora": (2e-3, 50)}
    cells = plan.comparison_cells(small, records)
    assert {cell.lr for cell in cells if cell.arm != "base"} == {2e-3}
    assert {cell.arm for cell in cells} == {"base", "lora", *BANDS}
    assert {cell.concept for cell in cells} == {TEST[0].name}
    with pytest.raises(ValueError, match="run this plan's tuning"):
        plan.comparison_cells(replace(small, arms=("tlora",)), records)


def test_equal_rates_are_those_of_tlora_and_only_other_trials_are_added():
    small = replace(plan.PLANS["full"], arms=("lora", "tlora"), ranks=(16,), test=2, seeds=1)
    records = [
        {"arm": arm, "concept": TUNING[0].name, "seed": 0, "r": 16, "r_min": 0, "lr": lr,
         "step": 100, "overlap": 0.5, "alignment": 0.5}
        for arm, lr in [("lora", 4e-3), ("tlora", 2e-3)]
    ]  # fmt: skip
    cells = plan.equal_rate_cells(small, records)
    assert {(c.arm, c.r, c.r_min, c.lr) for c in cells} == {
        ("base", 0, 0, 0), ("lora", 16, 0, 2e-3), ("tlora", 16, 8, 2e-3)
    }  # fmt: skip
    assert {c.concept for c in cells} == {concept.name for concept in TEST[:2]}
    chosen = {c.key for c in plan.comparison_cells(small, records)}
    assert {c.arm for c in cells if c.key not in chosen} == {"lora"}
    assert not plan.equal_rate_cells(replace(small, arms=("lora",)), records)


def test_little_noise_decides_nothing_and_full_noise_everything():
    shares = decided.kept_after(trial.fresh_pipeline("cpu"), count=8)
    assert list(shares) == [124, 249, 374, 499, 624, 749, 874, 999]
    assert min(shares[124].values()) > 0.9
    assert max(shares[999].values()) < 0.6
    assert shares[499]["background"] > shares[499]["shape"]  # coarse things are decided first


def test_a_trial_runs_on_the_toybox(monkeypatch):
    monkeypatch.setitem(trial.SAMPLING, "steps", 1)
    cell = trial.Cell("tlora", TEST[0].name, 0, 4, 2, 1e-3, (1,))
    ((step, values, pictures),) = trial.run(cell)
    assert step == 1
    assert {name: len(made) for name, made in pictures.items()} == {
        "asked": trial.ASKED, "free": trial.FREE, "unrelated": len(trial.UNRELATED)
    }  # fmt: skip
    shares = [v for k, v in values.items() if k not in ("loss", "features")]
    assert all(-1 <= value <= 1.5 for value in shares)
    ((_, base, _),) = trial.run(trial.Cell("base", TEST[0].name, 0))
    assert base["drift"] == pytest.approx(0, abs=1e-6)
    assert values["drift"] > base["drift"]
