"""The benchmark's statistics, on synthetic results with a known effect and with none."""

from dataclasses import replace

import numpy as np
import pytest
from evidence import analysis, limits, plots, tables, trial
from evidence.concepts import SPLITS
from evidence.encoder import FEATURES
from evidence.plan import PLANS, comparison_cells, equal_rate_cells, tuning_cells
from PIL import Image

PLAN = replace(PLANS["full"], arms=("lora", "tlora"), ranks=(16,), shares=(0.5,), steps=(50, 100))
LORA, TLORA = ("lora", 16, 0), ("tlora", 16, 8)


def synthetic(effect, seed=0):
    """Records in which T-LoRA's alignment is ``effect`` above LoRA's, at equal fidelity."""
    rng = np.random.default_rng(seed)
    names = [concept.name for split in SPLITS.values() for concept in split]
    difficulty = dict(zip(names, rng.normal(0, 0.1, len(names)), strict=True))

    def measure(cell, step):
        values = dict.fromkeys(tables.METRICS, 0.5)
        gain = effect if cell.arm == "tlora" else 0.0
        values["overlap"] = 0.3 + step / 500 + difficulty[cell.concept] / 4
        noise = rng.normal(0, 0.02)
        values["alignment"] = 0.7 - step / 1000 + gain + difficulty[cell.concept] + noise
        values["alignment"] -= 0.2 * (cell.arm == "lora" and cell.lr == max(PLAN.rates))
        values["features"] = rng.normal(size=(8, FEATURES)).tolist()
        return values

    def records(cells):
        return [
            {**{k: v for k, v in vars(cell).items() if k != "steps"}, "step": s, **measure(cell, s)}
            for cell in cells
            for s in cell.steps
        ]

    tuned = records(tuning_cells(PLAN))
    for record in tuned:  # LoRA is best at the lowest rate, T-LoRA at the highest
        best = max(PLAN.rates) if record["arm"] == "tlora" else min(PLAN.rates)
        record["overlap"] += 0.1 * (record["lr"] == best)
    cells = {c.key: c for c in comparison_cells(PLAN, tuned) + equal_rate_cells(PLAN, tuned)}
    return tuned + records(cells.values())


def difference(records, metric="alignment"):
    test = tables.tested(records, PLAN)
    pair = [analysis.select(test, variant, 100) for variant in (TLORA, LORA)]
    return analysis.paired(*pair, metric)


def test_a_known_effect_is_found_and_its_size_too():
    found = difference(synthetic(0.05))
    assert found.low > 0
    assert found.mean == pytest.approx(0.05, abs=0.015)
    assert found.concepts == 8


def test_no_effect_is_found_where_there_is_none():
    intervals = [difference(synthetic(0.0, seed)) for seed in range(20)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert covered >= 16
    assert difference(synthetic(0.05), "overlap").mean == pytest.approx(0, abs=1e-9)


def test_pairing_removes_the_concepts_difficulty():
    records = tables.tested(synthetic(0.05), PLAN)
    alone = analysis.bootstrap(
        analysis.table(analysis.select(records, TLORA, 100), "alignment"), draws=500
    )
    paired = difference(synthetic(0.05))
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_pairing_takes_only_what_both_have():
    records = tables.tested(synthetic(0.05), PLAN)
    ours, theirs = (analysis.select(records, variant, 100) for variant in (TLORA, LORA))
    assert analysis.paired(ours[:5], theirs, "alignment").concepts == 5
    with pytest.raises(ValueError, match="run the trials first"):
        analysis.paired(ours[:1], theirs[1:2], "alignment")


def test_interval_widens_with_fewer_concepts_not_with_fewer_seeds():
    rng = np.random.default_rng(0)
    level = rng.normal(size=8)
    values = {str(c): {s: level[c] + rng.normal(0, 0.01) for s in range(3)} for c in range(8)}
    whole = analysis.bootstrap(values)
    one_seed = analysis.bootstrap({c: {0: seeds[0]} for c, seeds in values.items()})
    few = analysis.bootstrap({c: values[c] for c in list(values)[:3]})
    width = {id(i): i.high - i.low for i in (whole, one_seed, few)}
    assert width[id(one_seed)] == pytest.approx(width[id(whole)], rel=0.15)
    assert whole.mean == pytest.approx(level.mean(), abs=0.02)
    assert whole.low < whole.mean < whole.high
    assert few.concepts == 3
    assert str(few) == f"{few.mean:.3f} (n=3)"  # no interval that looks surer than it is
    assert str(whole).endswith(f"{whole.high:.3f}]")


def test_resampling_leaves_out_seeds_that_a_concept_lacks():
    values = {"a": {0: 1.0, 1: 1.0, 2: 1.0}, "b": {5: 3.0}}
    interval = analysis.bootstrap(values)
    assert (interval.mean, interval.low, interval.high) == (2.0, 1.0, 3.0)


def test_front_is_the_best_alignment_of_at_least_each_fidelity():
    points = np.array([(0.2, 0.9), (0.5, 0.6), (0.4, 0.5)])
    best = analysis.front(points, np.array([0.1, 0.2, 0.3, 0.5, 0.6]))
    np.testing.assert_allclose(best, [0.9, 0.9, 0.6, 0.6, np.nan])


def test_front_bands_lie_apart_where_the_effect_is():
    records = tables.tested(synthetic(0.3), PLAN)
    grid = np.array([0.35, 0.45])
    bands = {
        v: analysis.front_band([analysis.select(records, v, s) for s in (50, 100)], grid)
        for v in (LORA, TLORA)
    }
    for mean, low, high in bands.values():
        assert (low <= mean).all()
        assert (mean <= high).all()
    assert (bands[TLORA][1] > bands[LORA][2]).all()


def test_a_curve_passes_a_fidelity_between_two_checkpoints():
    points = np.array([(0.1, 1.0), (0.3, 0.8), (0.3, 0.7), (0.2, 0.9), (0.4, 0.5)])
    assert analysis.on_curve(points, 0.2) == pytest.approx(0.9)
    assert analysis.on_curve(points[:2], 0.15) == pytest.approx(0.95)
    assert np.isnan(analysis.on_curve(points, 0.41))
    assert np.isnan(analysis.on_curve(points, 0.05))


def test_the_difference_at_equal_fidelity_is_the_known_effect():
    records = tables.tested(synthetic(0.05), PLAN)
    ours, theirs = ([analysis.select(records, v, s) for s in (50, 100)] for v in (TLORA, LORA))
    for later in theirs[1]:
        later["overlap"] += 0.1  # LoRA passes T-LoRA's last fidelity between its checkpoints
    found = analysis.matched(ours[1], theirs)
    # at half the way between LoRA's checkpoints, 25 steps before its last, it has 0.025 more
    assert found.mean == pytest.approx(0.05 - 0.025, abs=0.01)
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.06  # paired: the concepts' difficulty drops out
    assert analysis.matched(theirs[1], ours) is None


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 20000, 3))
    assert analysis.toy_frechet(first, first) == pytest.approx(0, abs=1e-3)
    assert analysis.toy_frechet(first, 2 * second + 1) == pytest.approx(3 + 3, rel=0.05)


def test_inception_score_counts_backgrounds():
    from evidence import encoder
    from evidence.concepts import Setting, draw

    def score(backgrounds):
        settings = [Setting(name, "plain", "center") for name in backgrounds]
        pictures = [draw(SPLITS["test"][0], setting) for setting in settings]
        return analysis.toy_inception(encoder.embed(pictures))

    assert score(["blue"] * 4) == pytest.approx(1, abs=0.05)
    assert 3 < score(["blue", "white", "black", "green"]) < 4.2


def test_report_and_plots_of_synthetic_results(tmp_path, monkeypatch):
    records = synthetic(0.05)
    truth = {c.name: np.random.default_rng(1).normal(size=(8, FEATURES)).tolist()
             for c in SPLITS["test"]}  # fmt: skip
    limit = [{**dict.fromkeys(tables.METRICS, 1.0), "concept": c, "features": f}
             for c, f in truth.items()]  # fmt: skip
    monkeypatch.setattr(limits, "measure_limits", lambda: {"true pictures": limit})
    text = tables.report(records, PLAN)
    assert "8 test concepts, 3 seeds, 288 of 288 trials" in text
    assert text.count("T-LoRA, r=16, r_min=8 - LoRA r, r=16") == 7
    # equal steps and earlier, equal fidelity, each arm at its best; again at equal rates
    chosen, equal = (part.split("- LoRA r, r=16 |")[1].split("|")[2]
                     for part in (text, text.split("### After 100 steps")[1]))  # fmt: skip
    assert float(chosen.split()[0]) == pytest.approx(0.05, abs=0.02)
    assert float(equal.split()[0]) == pytest.approx(0.25, abs=0.02)
    assert "## Equal rates (0.008)" in text
    assert "at T-LoRA's of 100 steps" in text.split("## Equal fidelity")[1]
    assert "| LoRA r | 0.001 |" in text.split("## The tuning concepts")[1]
    test = tables.tested(records, PLAN)
    plots.fronts(test, PLAN, 16, tmp_path / "front.png")
    plots.over_steps(test, PLAN, [LORA, TLORA], tmp_path / "steps.png")
    assert {file.name for file in tmp_path.iterdir()} == {"front.png", "steps.png"}


def test_a_grid_shows_the_pictures_of_its_cells_alone(tmp_path):
    cells = [trial.Cell("lora", SPLITS["test"][0].name, 0, 16, 0, lr, (50, 100)) for lr in (1, 2)]
    for cell, colour in zip(cells, ("red", "blue"), strict=True):
        Image.new("RGB", (40, 10), colour).save(tmp_path / cell.picture_name(100))
    assert plots.grid(tmp_path, cells[1:], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    colours = set(map(tuple, pixels.tolist()))
    assert (0, 0, 255) in colours
    assert (255, 0, 0) not in colours
    other = trial.Cell("ortho", SPLITS["test"][0].name, 0, 16)
    assert not plots.grid(tmp_path, [other], tmp_path / "other.png")


def test_ceiling_and_floor_enclose_every_measure(monkeypatch):
    monkeypatch.setitem(limits.SPLITS, "test", SPLITS["test"][:2])
    limits.measure_limits.cache_clear()
    kinds = limits.measure_limits()
    limits.measure_limits.cache_clear()
    mean = {
        kind: {m: np.mean([r[m] for r in records]) for m in tables.METRICS}
        for kind, records in kinds.items()
    }
    true, memorised, noise = (
        mean[kind] for kind in ("true pictures", "the given picture, always", "noise")
    )
    assert true["alignment"] == true["identity"] == memorised["identity"] == 1
    assert memorised["free_leakage"] == memorised["elsewhere_leakage"] == 1
    assert memorised["alignment"] < 0.3
    assert memorised["diversity"] < 0.01 < true["diversity"]
    assert mean["after the autoencoder"]["overlap"] > 0.7 > noise["overlap"]
    assert noise["identity"] == 0


def test_asked_bare_and_unrelated_pictures_are_judged_apart():
    concept = SPLITS["test"][0]
    true, given = limits.true_pictures(concept), limits.memorised_pictures(concept)
    values = trial.judge({**true, "free": given["free"]}, concept, true["unrelated"])
    assert (values["alignment"], values["elsewhere_leakage"]) == (1, 0)
    assert (values["free_leakage"], values["free_identity"]) == (1, 1)
    assert values["similarity"] == pytest.approx(1, abs=1e-5)
    assert (values["drift"], values["diversity"]) == pytest.approx((0, 0), abs=1e-5)
