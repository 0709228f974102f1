import math

import pytest
import torch

from peft_tlora import active_rank
from peft_tlora.schedule import RankSchedule, rank_mask
from peft_tlora.weights.encoding import Encoded, decode_schedule, encode_schedule
from peft_tlora.weights.start import Recipe


def paper_rank(t, r, r_min, alpha=1.0, total=1000):
    return math.floor(((total - t) / total) ** alpha * (r - r_min)) + r_min


@pytest.mark.parametrize("r", [4, 7, 16, 64, 104])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0])
def test_active_rank_equals_the_papers_formula_at_every_timestep(r, alpha):
    r_min = r // 2
    ts = torch.arange(0, 1001)
    expected = torch.tensor([paper_rank(t, r, r_min, alpha) for t in range(1001)])
    found = active_rank(ts, r, r_min, schedule_exponent=alpha)
    assert found.dtype == torch.int64
    if alpha == 1.0:
        assert torch.equal(found, expected)
    else:  # pow differs in the last bit between C libraries
        assert (found != expected).sum() <= 2


def test_active_rank_of_a_number_is_an_int_and_equals_the_tensors():
    ranks = [active_rank(t, 16) for t in (0, 1, 250.5, 999, 1000)]
    assert all(type(rank) is int for rank in ranks)
    assert ranks == active_rank(torch.tensor([0, 1, 250.5, 999, 1000]), 16).tolist()
    assert ranks[0] == 16
    assert ranks[-1] == 8


def test_cosine_replaces_the_linear_decay():
    for t in (0, 100, 500, 900, 1000):
        decay = (1 + math.cos(math.pi * t / 1000)) / 2
        expected = math.floor(decay**2 * (64 - 10)) + 10
        assert active_rank(t, 64, 10, rank_schedule="cosine", schedule_exponent=2.0) == expected


def test_constant_is_full_rank_at_every_timestep():
    assert active_rank(torch.tensor([0, 500, 1000]), 8, 2, rank_schedule="constant").tolist() == [
        8,
        8,
        8,
    ]


def test_reversed_time_and_unit_scale_mirror_the_schedule():
    u = torch.linspace(0, 1, 65, dtype=torch.float64)  # exact binary fractions
    forward = active_rank(u, 64, 16, num_train_timesteps=1.0)
    backward = active_rank(1 - u, 64, 16, num_train_timesteps=1.0, timestep_reversed=True)
    assert torch.equal(forward, backward)
    assert forward[0] == 64
    assert forward[-1] == 16


def test_out_of_range_timesteps_are_clamped_before_the_power():
    ts = torch.tensor([-50.0, 1200.0])
    assert active_rank(ts, 8, 2, schedule_exponent=0.5).tolist() == [8, 2]


def test_log_sigma_puts_the_share_of_noise_in_the_place_of_time():
    sigma = torch.tensor([700.0, 2.9, 0.9, 0.2, 0.0])
    ranks = active_rank(sigma.log() / 4, 10, 2, timestep_type="log_sigma")
    assert ranks.tolist() == [2, 4, 6, 8, 10]
    assert active_rank(0.0, 10, 2, timestep_type="log_sigma") == 6


@pytest.mark.parametrize(
    ("schedule", "inside", "outside"),
    [
        (RankSchedule(8), (0, 1000, 1001), (-3, 1003)),
        (RankSchedule(8, num_train_timesteps=1.0), (0.0, 1.0), (-0.1, 1.1, 999.0)),
        (RankSchedule(8, timestep_type="log_sigma"), (1.64, -1.55), (500.0,)),
    ],
)
def test_the_expected_range(schedule, inside, outside):
    assert all(schedule.allows(t) for t in inside)
    assert not any(schedule.allows(t) for t in outside)
    assert schedule.allows(torch.tensor([*inside, *outside])).tolist() == (
        [True] * len(inside) + [False] * len(outside)
    )


@pytest.mark.parametrize(
    ("min_rank", "r", "expected"),
    [(0.5, 16, 8), (0.5, 5, 2), (0.5, 1, 1), (0.0, 16, 1), (1.0, 16, 16), (0, 16, 0), (3, 16, 3)],
)
def test_min_rank_is_a_rank_or_a_rounded_down_fraction(min_rank, r, expected):
    assert active_rank(1000, r, min_rank) == expected


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_timesteps_move_the_rank_by_one_at_most(low):
    ts = torch.arange(0, 1000)
    difference = active_rank(ts, 64) - active_rank(ts.to(low), 64)
    assert difference.abs().max() <= 1


def test_rank_mask_has_the_first_ranks_active():
    mask = rank_mask(torch.tensor([[0, 2], [3, 1]]), 3, torch.device("cpu"))
    assert mask.int().tolist() == [[[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]
    assert rank_mask(2, 3, torch.device("cpu")).int().tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 4.0}, TypeError, "r must be an int"),
        ({"min_rank": -1}, ValueError, r"\[0, 8\]"),
        ({"min_rank": 9}, ValueError, "min_rank=9"),
        ({"min_rank": 1.5}, ValueError, r"fraction of r and must lie in \[0, 1\]"),
        ({"min_rank": float("nan")}, ValueError, "min_rank=nan"),
        ({"min_rank": True}, TypeError, "min_rank"),
        ({"rank_schedule": "linear"}, ValueError, "'power', 'cosine', 'constant'"),
        ({"schedule_exponent": 0.0}, ValueError, "schedule_exponent"),
        ({"num_train_timesteps": float("inf")}, ValueError, "num_train_timesteps"),
        ({"timestep": float("nan")}, ValueError, "timestep"),
        ({"timestep_type": "edm"}, ValueError, "'linear', 'log_sigma'"),
        ({"rank_multiple": 3}, ValueError, "r=8 must be a multiple of rank_multiple=3"),
        ({"rank_multiple": 4, "min_rank": 2}, ValueError, "min_rank=2 must be a multiple"),
    ],
)
def test_bad_values_raise(kwargs, error, words):
    with pytest.raises(error, match=words):
        active_rank(**{"timestep": 500, "r": 8, **kwargs})


@pytest.mark.parametrize(("min_rank", "single"), [(0.5, 0.5), (3, 1), (0.1, 0.1), (0, 0)])
def test_ranks_in_groups_follow_the_schedule_of_the_groups(min_rank, single):
    ts = torch.arange(0, 1001)
    groups = active_rank(ts, 4, single)
    assert torch.equal(active_rank(ts, 12, min_rank, rank_multiple=3), 3 * groups)


def test_a_timestep_that_was_divided_in_float32_counts_as_what_it_was():
    """The authors' code floors in float32 what is a whole number of ranks; (1 - 0.8) 10 is 2."""
    ts = torch.arange(0, 1001)
    assert active_rank(torch.tensor(800.0) / 1000, 20, 10, num_train_timesteps=1.0) == 12
    for r in range(1, 129):
        for r_min in {0, 1, r // 2, r - 1, r}:
            exact = torch.tensor([(1000 - t) * (r - r_min) // 1000 + r_min for t in range(1001)])
            assert torch.equal(active_rank(ts, r, r_min), exact)
            share = ts.float() / 1000
            assert torch.equal(active_rank(share, r, r_min, num_train_timesteps=1.0), exact)
            clean = active_rank(
                1 - share, r, r_min, num_train_timesteps=1.0, timestep_reversed=True
            )
            assert torch.equal(clean, exact)


RECIPE = Recipe("middle", 2**63 - 1, 2**63 - 7, 12800, (-64, 63, *range(-11, 11)))


@pytest.mark.parametrize("recipe", [None, RECIPE], ids=["", "recipe"])
@pytest.mark.parametrize("min_rank", [0.5, 1 / 3, 0, 6])
@pytest.mark.parametrize("timestep_type", ["linear", "log_sigma", None])
def test_a_schedule_survives_its_encoding_to_the_bit(min_rank, timestep_type, recipe):
    schedule = RankSchedule(8, min_rank, "cosine", 1 / 3, 1.6377, True, timestep_type, 2)
    encoded = Encoded(schedule, 1 / 7, True, recipe)
    decoded = decode_schedule(encode_schedule(encoded), 8, "layer")
    assert decoded == encoded
    assert type(decoded.schedule.min_rank) is type(min_rank)


ENCODED = Encoded(RankSchedule(8, 2), 8.0, False, RECIPE)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.uint8],
)
def test_a_schedule_survives_every_cast_and_averages_with_itself(dtype):
    tensor = encode_schedule(ENCODED).to(dtype)
    assert decode_schedule(tensor, 8, "layer") == ENCODED
    wide = tensor.to(torch.bfloat16) if dtype.itemsize == 1 else tensor
    for average in (
        (wide + wide) / 2,
        0.3 * wide + 0.7 * wide,
        torch.lerp(wide, wide, 0.1),
        torch.stack([wide] * 3).mean(0),
    ):
        assert decode_schedule(average, 8, "layer") == ENCODED


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (ENCODED._replace(lora_alpha=4.0), "averaged"),
        (ENCODED._replace(recipe=None), "averaged"),
        (ENCODED._replace(schedule=RankSchedule(8, 4)), "averaged"),
    ],
)
def test_a_mixture_of_two_schedules_raises(other, words):
    one, two = encode_schedule(ENCODED), encode_schedule(other)
    for mixture in ((one + two) / 2, (one + 2 * two) / 3, two.where(torch.arange(248) < 166, one)):
        with pytest.raises(ValueError, match=words):
            decode_schedule(mixture, 8, "layer")


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (torch.zeros(14, dtype=torch.int64), r"shape \(248,\), got \(14,\): .* another version"),
        (torch.zeros(248), "doesn't add up"),
        (0.8 * encode_schedule(ENCODED), "isn't of whole numbers from 0 to 7"),
        (torch.full((248,), torch.nan), "isn't of whole numbers"),
        (encode_schedule(ENCODED) - 1, "isn't of whole numbers"),
    ],
)
def test_a_damaged_schedule_raises(damaged, words):
    with pytest.raises(ValueError, match=f"layer down.to_q .*{words}|layer down.to_q {words}"):
        decode_schedule(damaged, 8, "down.to_q")
