"""The start of a layer's factors as a function of a seed, the layer's name and its shape."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .orthogonal import OrthoInit, random_triplets

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LEADING = ("base_model.model.", "module.")
_SAMPLES = 8  # of each factor in a fingerprint
_LEVELS = 8  # of a fingerprint a standard deviation


class Start(NamedTuple):
    """The frozen factors of a layer.

    Args:
        q0: Down-projection of shape (r, in, *kernel).
        p0: Up-projection of shape (out, r / groups, *ones).
        lam0: Singular values of shape (r, 1).
    """

    q0: Tensor
    p0: Tensor
    lam0: Tensor


@dataclass(frozen=True)
class Recipe:
    """What a layer's start is made of, besides its name and shape.

    Args:
        choice: Which singular triplets it is.
        seed: Seed of the draw.
        in_features: Size of the second dimension of the down-projection that was drawn; a layer
            that was widened since, as for a control adapter of FLUX, has zeros for the rest.
        fingerprint: Of the start, as `fingerprint` computes it.
    """

    choice: OrthoInit
    seed: int
    in_features: int
    fingerprint: tuple[int, ...]


def canonical_name(name: str) -> str:
    """A layer's name without what wrappers put into it: PEFT, DDP, FSDP, compilers, checkpointing.

    So that the start is the same in a plain model, in a wrapped one and in a nested one.
    """
    name = _WRAPPERS.sub("", name)
    while (short := name.removeprefix(_LEADING[0]).removeprefix(_LEADING[1])) != name:
        name = short
    return name


def draw_start(
    dq: Tensor, dp: Tensor, groups: int, choice: OrthoInit, *, seed: int, name: str
) -> Start:
    """Draw the start of a layer; each group of a grouped convolution has its own draw.

    Args:
        dq: A down-projection of shape (r, in, *kernel), whose values don't matter.
        dp: An up-projection of shape (out, r / groups, *ones), likewise.
        groups: Groups of the up-projection.
        choice: Which singular triplets.
        seed: Seed of the draw.
        name: The layer's `canonical_name`.

    Returns:
        Factors in float32 on the CPU, which bfloat16 and float16 hold exactly.
    """
    draws = [
        random_triplets(
            len(dp) // groups,
            dq[0].numel(),
            len(dq) // groups,
            choice,
            seed=seed,
            name=f"{name}/{group}",
        )
        for group in range(groups)
    ]
    p0, lam0, q0 = draws[0] if groups == 1 else map(torch.cat, zip(*draws, strict=True))
    return Start(q0.reshape(dq.shape), p0.reshape(dp.shape), lam0[:, None])


def fingerprint(start: Start) -> tuple[int, ...]:
    """Some entries of a start as whole numbers in [-64, 63], to recognise it by.

    Entries rather than a checksum, as another LAPACK may round the last digit otherwise.
    """
    q0, p0, lam0 = (factor.detach().flatten() for factor in start)
    numbers: list[float] = []
    for factor, size in ((q0, start.q0[0].numel()), (p0, len(start.p0))):
        picked = factor[torch.linspace(0, len(factor) - 1, _SAMPLES).long()]
        numbers += (picked * size**0.5 * _LEVELS).tolist()
    largest = max(float(lam0[0]), 1e-30)
    numbers += (lam0[torch.linspace(0, len(lam0) - 1, _SAMPLES).long()] / largest * 32).tolist()
    return tuple(max(-64, min(63, round(number))) for number in numbers)


def rebuild(recipe: Recipe, dq: Tensor, dp: Tensor, groups: int, name: str) -> Start:
    """The start of a recipe; see `draw_start`.

    Raises:
        ValueError: If it isn't that with which the adapter was trained.
    """
    drawn = dq if dq.shape[1] == recipe.in_features else dq.new_empty(len(dq), recipe.in_features)
    start = draw_start(drawn, dp, groups, recipe.choice, seed=recipe.seed, name=name)
    found = fingerprint(start)
    if any(abs(a - b) > 1 for a, b in zip(found, recipe.fingerprint, strict=True)):
        raise ValueError(
            f"The start of the factors made for {name} from init_seed={recipe.seed} is not the one "
            "that the adapter was trained with, so the adapter would compute something else. "
            "Either the layer has another name in this model, or this version of peft_tlora draws "
            "other numbers. Load it where it was trained and save it with "
            "save_initial_factors=True."
        )
    return widened(start, dq)


def widened(start: Start, dq: Tensor) -> Start:
    """The start with columns of zeros for the inputs that a layer got later."""
    missing = dq.shape[1] - start.q0.shape[1]
    if missing <= 0 or dq.dim() > 2:
        return start
    return start._replace(q0=torch.nn.functional.pad(start.q0, (0, missing)))
