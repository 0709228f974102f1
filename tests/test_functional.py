import pytest
import torch

from peft_tlora.functional import Factors, align_ranks, delta_weight, pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_fused_factors_are_exactly_zero_at_initialisation(dtype):
    q, p, lam = torch.randn(4, 6), torch.randn(5, 4), torch.rand(4, 1)
    for other in (dtype, torch.float32):  # hosts cast one half or both
        start = [tensor.to(dtype) for tensor in (q, p, lam)]
        down, up = Factors(*[torch.zeros_like(t, dtype=other) for t in start], *start).fused()
        product = up @ torch.diag(torch.rand(8).to(up.dtype)) @ down
        assert (product == 0).all()


def test_the_fused_product_equals_the_difference_of_both():
    q, q0 = torch.randn(2, 4, 6, dtype=torch.float64)
    p, p0 = torch.randn(2, 5, 4, dtype=torch.float64)
    lam, lam0 = torch.rand(2, 4, 1, dtype=torch.float64)
    mask = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64)
    down, up = Factors(q - q0, p - p0, lam - lam0, q0, p0, lam0).fused()
    naive = p @ torch.diag(lam[:, 0] * mask) @ q - p0 @ torch.diag(lam0[:, 0] * mask) @ q0
    torch.testing.assert_close(delta_weight(down, up, pair(mask, mask)), naive)


def test_pair_interleaves_by_group():
    first, second = torch.arange(4), torch.arange(10, 14)
    assert pair(first, second).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert pair(first, second, groups=2).tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.parametrize(
    ("active", "rows", "tokens", "expected"),
    [
        (torch.tensor(3), 7, None, torch.tensor(3)),
        (torch.tensor([3]), 7, None, torch.tensor(3)),
        (torch.tensor([3, 5]), 2, 9, torch.tensor([3, 5])),
        (torch.tensor([3, 5]), 4, None, torch.tensor([3, 3, 5, 5])),  # b-major
        (torch.tensor([[3, 1, 2], [5, 6, 4]]), 2, 3, torch.tensor([[3, 1, 2], [5, 6, 4]])),
        (torch.tensor([[3, 1, 2], [5, 6, 4]]), 2, None, torch.tensor([1, 4])),  # the noisiest
        (torch.tensor([[3, 1, 2], [5, 6, 4]]), 6, None, torch.tensor([3, 1, 2, 5, 6, 4])),
        (torch.tensor([[3, 1, 2], [5, 6, 4]]), 4, None, torch.tensor([1, 1, 4, 4])),
    ],
)
def test_ranks_are_brought_to_the_rows_of_a_layer(active, rows, tokens, expected):
    aligned = align_ranks(active, rows, tokens)
    assert aligned is not None
    assert torch.equal(aligned, expected)


def test_rows_that_match_no_batch_are_not_guessed():
    assert align_ranks(torch.tensor([3, 5]), 3, None) is None
    assert align_ranks(torch.tensor([3, 5, 7, 9]), 2, None) is None
