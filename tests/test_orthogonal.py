import numpy as np
import pytest
import scipy.stats
import torch

from peft_tlora.orthogonal import ORTHO_INITS, random_triplets, weight_triplets

DRAWS = 1000
R = 3


def dense_svd_triplets(rows, columns, choice):
    """The paper's initialisation, literally: batches of Q, P and lambda."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(DRAWS, rows, columns, generator=generator) / R
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    k = min(rows, columns)
    start = {"principal": 0, "middle": -(-(k - R) // 2), "last": k - R}[choice]
    window = slice(start, start + R)
    # LAPACK's SVD fixes signs by convention, which a Haar matrix does not
    sign = torch.sign(torch.randn(DRAWS, 1, R, generator=generator))
    return vh[:, window] * sign.mT, u[:, :, window] * sign, s[:, window]


def our_triplets(rows, columns, choice):
    draws = [random_triplets(rows, columns, R, choice, seed=s, name="layer") for s in range(DRAWS)]
    return [torch.stack(parts) for parts in zip(*draws, strict=True)]


STATISTICS = {
    **{f"lambda_{i}": lambda q, p, lam, i=i: lam[:, i] for i in range(R)},
    "entry of P": lambda q, p, lam: p[:, 0, 0],
    "largest entry of P": lambda q, p, lam: p.abs().amax((1, 2)),
    "entry of Q": lambda q, p, lam: q[:, R - 1, 1],
    "product of two columns": lambda q, p, lam: p[:, 0, 0] * p[:, 1, 1],
    "entry of the product": lambda q, p, lam: ((p * lam[:, None]) @ q)[:, 0, 1],
}


@pytest.mark.parametrize("choice", ORTHO_INITS)
@pytest.mark.parametrize("shape", [(12, 12), (7, 15), (15, 7)], ids=["square", "wide", "tall"])
def test_the_law_is_that_of_a_dense_svd(shape, choice):
    dense, ours = dense_svd_triplets(*shape, choice), our_triplets(*shape, choice)
    for name, statistic in STATISTICS.items():
        p_value = scipy.stats.ks_2samp(statistic(*dense), statistic(*ours)).pvalue
        assert p_value > 1e-4, f"{name}: p={p_value}"


def test_the_law_test_can_tell_a_wrong_scale():
    dense, ours = dense_svd_triplets(12, 12, "last"), our_triplets(12, 12, "last")
    assert scipy.stats.ks_2samp(dense[2][:, 0], 1.1 * ours[2][:, 0]).pvalue < 1e-4


@pytest.mark.parametrize("choice", ORTHO_INITS)
def test_frames_are_orthonormal_and_values_descend(choice):
    q, p, lam = random_triplets(40, 24, 8, choice, seed=0, name="layer")
    for frame in (p.T, q):  # of 8 significant bits
        distance = frame @ frame.T - torch.eye(8)
        assert distance.abs().max() < 4e-3
        assert distance.square().mean().sqrt() < 4e-3 / frame.shape[1] ** 0.5
    assert (lam[:-1] >= lam[1:]).all()
    assert (lam > 0).all()


def test_the_smallest_values_of_a_large_square_matrix_are_accurate():
    # figures of the paper's own initialisation, 1280 x 1280 at r=64: 0.043 .. 0.0002
    values = np.stack(
        [random_triplets(1280, 1280, 64, "last", seed=s, name="layer").lam for s in range(8)]
    )
    assert values[:, 0].mean() == pytest.approx(0.043, abs=0.003)
    assert 0 < values[:, -1].mean() < 0.001


def test_a_draw_depends_on_seed_name_and_shape_only():
    first = random_triplets(16, 12, 4, "last", seed=0, name="a")
    random_triplets(16, 12, 4, "last", seed=0, name="b")
    torch.rand(3)
    again = random_triplets(16, 12, 4, "last", seed=0, name="a")
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other_name = random_triplets(16, 12, 4, "last", seed=0, name="b")
    other_seed = random_triplets(16, 12, 4, "last", seed=1, name="a")
    assert not torch.equal(first.p, other_name.p)
    assert torch.equal(first.lam, other_name.lam)  # one draw of the values a shape
    assert not torch.equal(first.lam, other_seed.lam)


def test_a_rank_above_both_dimensions_keeps_r_columns():
    q, p, lam = random_triplets(5, 3, 7, "last", seed=0, name="layer")
    assert p.shape == (5, 7)
    assert q.shape == (7, 3)
    assert (lam[:3] > 0).all()
    assert (lam[3:] == 0).all()
    torch.testing.assert_close(p.norm(dim=0), torch.ones(7), atol=4e-3, rtol=0)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(7), atol=4e-3, rtol=0)


def test_the_weights_triplets_rebuild_the_weight():
    weight = torch.randn(9, 6)
    q, p, lam = weight_triplets(weight, 6, "last", seed=0, name="layer")
    torch.testing.assert_close((p * lam) @ q, weight, atol=2e-2, rtol=0)
    q, p, lam = weight_triplets(weight, 2, "principal", seed=0, name="layer")
    assert (weight - (p * lam) @ q).norm() < weight.norm()
    torch.testing.assert_close(lam[0], torch.linalg.matrix_norm(weight, 2), atol=0, rtol=4e-3)


def test_a_draw_is_exact_in_16_bits():
    for triplets in (
        random_triplets(1280, 640, 64, "last", seed=0, name="layer"),
        weight_triplets(torch.randn(90, 60), 8, "last", seed=0, name="layer"),
    ):
        for factor in triplets:
            for dtype in (torch.bfloat16, torch.float16):
                assert torch.equal(factor.to(dtype).float(), factor)


def test_the_numbers_of_a_draw_stay():
    """Files don't hold them: other numbers make every file of today worthless."""
    q, p, lam = random_triplets(640, 1280, 64, "last", seed=0, name="layer")
    assert [p[0, 0], p[-1, -1]] == [-0.04296875, 0.008056640625]
    assert [lam[0], lam[-1]] == [0.25390625, 0.166015625]
    assert [q[0, 0], q[-1, -1]] == [0.045654296875, -0.0198974609375]
    q, p, lam = random_triplets(5, 3, 7, "middle", seed=2**62, name="layer/1")
    assert [p[0, 0], p[-1, -1]] == [-0.76171875, 0.051025390625]
    assert [lam[0], lam[2]] == [0.36328125, 0.1923828125]
    assert [q[0, 0], q[-1, -1]] == [-0.37109375, 0.16015625]
