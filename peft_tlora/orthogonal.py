"""The orthogonal initialisation: singular triplets of a Gaussian matrix without its SVD."""

import functools
import hashlib
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import scipy.linalg
import torch
from scipy.special import gammaincinv, ndtri
from torch import Tensor

OrthoInit = Literal["last", "middle", "principal"]
OrthoSource = Literal["random", "weight"]
ORTHO_INITS: tuple[str, ...] = get_args(OrthoInit)
ORTHO_SOURCES: tuple[str, ...] = get_args(OrthoSource)


class Triplets(NamedTuple):
    """Singular triplets, in the order of `functional.Factors`.

    Args:
        q: Right singular vectors of shape (r, in), the rows of the down-projection.
        p: Left singular vectors of shape (out, r), the columns of the up-projection.
        lam: Singular values of shape (r,), in descending order.
    """

    q: Tensor
    p: Tensor
    lam: Tensor


def random_triplets(
    out_features: int, in_features: int, r: int, choice: OrthoInit, *, seed: int, name: str
) -> Triplets:
    """Draw r singular triplets of R, an (out, in) matrix with entries N(0, (1/r)^2).

    R is bi-orthogonally invariant, so its singular vectors are Haar frames independent of its
    singular values: the frames are drawn by QR and the values from the bidiagonal model. The cost
    is O((out + in) r^2) instead of the SVD's O(out in min(out, in)).

    The draw is computed in float64 and rounded to 8 significant bits, which bfloat16 and float16
    hold exactly: whoever casts the frozen factors to 16 bits changes nothing. The columns stay
    orthonormal to about 1e-3 / sqrt(size).

    Args:
        out_features: Rows of R.
        in_features: Columns of R.
        r: Rank of the layer. If it exceeds k = min(out, in), the last r - k triplets have singular
            value 0 and independent unit vectors, so that the surplus can learn.
        choice: Which of the k triplets: the "last" (smallest), "middle" or "principal" (largest) r.
        seed: The draw is a function of (seed, name) for the frames and of (seed, shape) for the
            values, which layers of one shape thus share.
        name: The layer's name.

    Returns:
        The triplets in float32 on the CPU.
    """
    k = min(r, out_features, in_features)
    values = _singular_values(out_features, in_features, r, choice, seed)
    rng = _generator(seed, name)
    left = _haar_frame(out_features, k, rng)
    right = _haar_frame(in_features, k, rng)
    return _with_surplus(_rounded(right), _rounded(left).mT, _rounded(values), r, rng)


def weight_triplets(weight: Tensor, r: int, choice: OrthoInit, *, seed: int, name: str) -> Triplets:
    """The singular triplets of a weight matrix of shape (out, in); else as `random_triplets`."""
    left, values, right = torch.linalg.svd(weight.detach().cpu().float(), full_matrices=False)
    window = _window(len(values), min(r, len(values)), choice)
    rng = _generator(seed, name)
    q, p, lam = map(_rounded, (right[window], left[:, window], values[window]))
    return _with_surplus(q, p, lam, r, rng)


def derive_seed(seed: int, name: str) -> int:
    """A seed that depends on a base seed and a name only, not on the order of calls."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _window(k: int, count: int, choice: OrthoInit) -> slice:
    start = {"principal": 0, "middle": math.ceil((k - count) / 2), "last": k - count}[choice]
    return slice(start, start + count)


def _generator(seed: int, name: str) -> np.random.SFC64:
    """Raw bits, whose stream numpy promises to keep; it doesn't that of its distributions."""
    return np.random.SFC64(derive_seed(seed, name))


def _rounded(values: Tensor) -> Tensor:
    """Round to 8 significant bits, as bfloat16 has, and to multiples of 2^-24, as float16 has."""
    return values.bfloat16().half().float()


@functools.cache
def _quantiles() -> np.ndarray:
    """The middle quantiles of 2^16 equal parts of the normal distribution."""
    return ndtri((np.arange(2**16) + 0.5) / 2**16)


def _gaussian(generator: np.random.SFC64, rows: int, columns: int) -> Tensor:
    """Normal numbers of 16 random bits each: several times faster than numpy's of 53."""
    raw = generator.random_raw(-(-rows * columns // 4)).astype("<u8", copy=False)
    numbers = _quantiles().take(raw.view("<u2")[: rows * columns])
    return torch.from_numpy(numbers).view(rows, columns)


def _chi(generator: np.random.SFC64, degrees: np.ndarray) -> np.ndarray:
    """A number of the chi distribution of each number of degrees of freedom."""
    uniform = ((generator.random_raw(len(degrees)) >> np.uint64(11)) + 0.5) * 2.0**-53
    return np.sqrt(2 * gammaincinv(degrees / 2, uniform))


def _haar_frame(size: int, count: int, rng: np.random.SFC64) -> Tensor:
    """So many orthonormal rows of a size: the Q^T of a Gaussian matrix.

    Its R has a positive diagonal, as any other Q has another law. By torch, as the threads of
    numpy's and of torch's libraries get into each other's way.
    """
    gaussian = _gaussian(rng, count, size)
    if 2 * count > size:  # may be badly conditioned
        q, r = torch.linalg.qr(gaussian.mT)
        return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT
    lower = torch.linalg.cholesky(gaussian @ gaussian.mT)  # R^T
    identity = torch.eye(count, dtype=gaussian.dtype, device=gaussian.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False) @ gaussian


def _singular_values(rows: int, columns: int, r: int, choice: OrthoInit, seed: int) -> Tensor:
    values = _gaussian_singular_values(
        max(rows, columns), min(rows, columns), min(r, rows, columns), choice, seed
    )
    return torch.from_numpy(values / r)


@functools.lru_cache(maxsize=256)
def _gaussian_singular_values(m: int, n: int, r: int, choice: OrthoInit, seed: int) -> np.ndarray:
    """The chosen r singular values of an m x n standard Gaussian matrix (m >= n), descending.

    The bidiagonal matrix with diagonal chi_m .. chi_{m-n+1} and superdiagonal chi_{n-1} .. chi_1
    has their joint law (Dumitriu and Edelman 2002). Its singular values are the positive
    eigenvalues of the tridiagonal matrix with a zero diagonal and both bands interleaved (Golub
    and Kahan 1965), which keeps the small ones accurate, as B^T B would not.
    """
    rng = _generator(seed, f"{m}x{n}")
    band = np.empty(2 * n - 1)
    band[0::2] = _chi(rng, np.arange(m, m - n, -1))
    band[1::2] = _chi(rng, np.arange(n - 1, 0, -1))
    window = _window(n, r, choice)
    # eigenvalues ascend: -s_0 .. -s_{n-1}, s_{n-1} .. s_0
    picked = (2 * n - window.stop, 2 * n - window.start - 1)
    eigenvalues = scipy.linalg.eigvalsh_tridiagonal(
        np.zeros(2 * n), band, select="i", select_range=picked
    )
    return np.maximum(eigenvalues[::-1], 0.0)


def _with_surplus(q: Tensor, p: Tensor, lam: Tensor, r: int, rng: np.random.SFC64) -> Triplets:
    surplus = r - len(lam)
    if surplus:
        extra_p = _gaussian(rng, p.shape[0], surplus)
        extra_q = _gaussian(rng, surplus, q.shape[1])
        extra_p /= extra_p.norm(dim=0, keepdim=True)
        extra_q /= extra_q.norm(dim=1, keepdim=True)
        p = torch.cat([p, _rounded(extra_p)], dim=1)
        q = torch.cat([q, _rounded(extra_q)])
        lam = torch.cat([lam, lam.new_zeros(surplus)])
    return Triplets(q.contiguous(), p.contiguous(), lam.contiguous())
