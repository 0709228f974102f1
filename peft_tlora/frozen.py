"""Frozen factors that a file leaves out: made again from a seed, and checked."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .orthogonal import OrthoInit, random_triplets


@dataclass(frozen=True)
class Recipe:
    """What a layer's frozen factors are made of, besides its name and shape.

    Args:
        choice: Which singular triplets they are.
        seed: Seed of the draw.
        checksum: Of the factors in float32, as `checksum` computes it.
    """

    choice: OrthoInit
    seed: int
    checksum: int


def random_factors(
    q: Tensor, p: Tensor, groups: int, choice: OrthoInit, *, seed: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Initial P, lambda and Q of a layer; each group of a grouped convolution has its own draw.

    Args:
        q: A down-projection of shape (r, in, *kernel), whose values don't matter.
        p: An up-projection of shape (out, r / groups, *ones), likewise.
        groups: Groups of the up-projection.
        choice: Which singular triplets.
        seed: Seed of the draw.
        name: The layer's name in the model.

    Returns:
        Of shape (out, r / groups, *ones), (r,) and (r, in, *kernel), in float32 on the CPU.
    """
    draws = [
        random_triplets(
            len(p) // groups,
            q[0].numel(),
            len(q) // groups,
            choice,
            seed=seed,
            name=f"{name}/{group}",
        )
        for group in range(groups)
    ]
    p0, lam0, q0 = (torch.cat(factors) for factors in zip(*draws, strict=True))
    return p0.reshape(p.shape), lam0, q0.reshape(q.shape)


def checksum(factors: tuple[Tensor, Tensor, Tensor]) -> int:
    """A number of 63 bits that tells whether frozen factors have the same bits."""
    digest = hashlib.sha256()
    for factor in factors:
        digest.update(factor.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def rebuild(
    recipe: Recipe, q: Tensor, p: Tensor, groups: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of a recipe; see `random_factors`.

    Raises:
        ValueError: If their bits aren't those that the adapter was trained with.
    """
    factors = random_factors(q, p, groups, recipe.choice, seed=recipe.seed, name=name)
    if checksum(factors) != recipe.checksum:
        raise ValueError(
            f"The file holds no frozen factors (save_initial_factors=False), and those rebuilt for "
            f"{name} from init_seed={recipe.seed} differ from those that it was trained with, so "
            "the adapter would compute something else. Either the layer has another name in this "
            "model, or this version of peft_tlora or numpy, or this processor, draws other "
            "numbers. Load it where it was trained and save it with save_initial_factors=True."
        )
    return factors
