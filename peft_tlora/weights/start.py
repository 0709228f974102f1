"""The start of a layer's factors as a function of a seed, the layer's name and its shape."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..orthogonal import OrthoInit, derive_seed, random_triplets

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
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
    """What a layer's start is made of, besides its shape.

    Args:
        choice: Which singular triplets it is.
        seed: Seed of the draw.
        name: The `name_key` of the layer where it was trained; another version of the host may
            name it otherwise.
        in_features: Size of the second dimension of the down-projection that was drawn; a layer
            that was widened since, as for a control adapter of FLUX, has zeros for the rest.
        fingerprint: Of the start, as `fingerprint` computes it.
    """

    choice: OrthoInit
    seed: int
    name: int
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


def name_key(name: str) -> int:
    """A layer's name as a number of 63 bits, without what wrappers have put into it."""
    return derive_seed(0, canonical_name(name))


def draw_start(
    dq: Tensor, dp: Tensor, groups: int, choice: OrthoInit, *, seed: int, name: int
) -> Start:
    """Draw the start of a layer; each group of a grouped convolution has its own draw.

    Args:
        dq: A down-projection of shape (r, in, *kernel), whose values don't matter.
        dp: An up-projection of shape (out, r / groups, *ones), likewise.
        groups: Groups of the up-projection.
        choice: Which singular triplets.
        seed: Seed of the draw.
        name: The layer's `name_key`.

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
    q0, p0, lam0 = draws[0] if groups == 1 else map(torch.cat, zip(*draws, strict=True))
    return Start(q0.reshape(dq.shape), p0.reshape(dp.shape), lam0[:, None])


def fingerprint(start: Start) -> tuple[int, ...]:
    """Some entries of a start as whole numbers in [-64, 63], to recognise it by.

    Entries rather than a checksum, as another LAPACK may round the last digit otherwise.
    """
    q0, p0, lam0 = (factor.detach().flatten().numpy() for factor in start)
    largest = max(float(lam0[0]), 1e-30)
    sizes = (start.q0[0].numel() ** 0.5, len(start.p0) ** 0.5, 4 / largest)
    scaled = [_picked(f) * (_LEVELS * size) for f, size in zip((q0, p0, lam0), sizes, strict=True)]
    return tuple(np.concatenate(scaled).round().clip(-64, 63).astype(int).tolist())


def new_start(
    dq: Tensor, dp: Tensor, groups: int, choice: OrthoInit, *, seed: int, name: str
) -> tuple[Start, Recipe]:
    """The start of a new layer and what it is made of; see `draw_start`."""
    key = name_key(name)
    start = draw_start(dq, dp, groups, choice, seed=seed, name=key)
    return start, Recipe(choice, seed, key, dq.shape[1], fingerprint(start))


def _picked(entries: np.ndarray) -> np.ndarray:
    return entries[np.arange(_SAMPLES) * (len(entries) - 1) // (_SAMPLES - 1)].astype(np.float64)


def rebuild(recipe: Recipe, dq: Tensor, dp: Tensor, groups: int, layer: str) -> Start:
    """The start of a recipe; see `draw_start`.

    Raises:
        ValueError: If it isn't that with which the adapter was trained, or can't be of this layer.
    """
    narrower = dq.dim() == 2 and 1 <= recipe.in_features < dq.shape[1]
    if recipe.in_features != dq.shape[1] and not narrower:
        raise ValueError(
            f"The start of the factors of {layer} was made for {recipe.in_features} inputs, it has "
            f"{dq.shape[1]}. Is the adapter for another base model?"
        )
    drawn = dq if dq.shape[1] == recipe.in_features else dq.new_empty(len(dq), recipe.in_features)
    start = draw_start(drawn, dp, groups, recipe.choice, seed=recipe.seed, name=recipe.name)
    found = fingerprint(start)
    if any(abs(a - b) > 1 for a, b in zip(found, recipe.fingerprint, strict=True)):
        raise ValueError(
            f"The start of the factors made for {layer} from init_seed={recipe.seed} is not that "
            "with which the adapter was trained, so it would compute something else: this version "
            "of peft_tlora draws other numbers. Load it where it was trained and save it with "
            "save_initial_factors=True."
        )
    return widened(start, dq)


def widened(start: Start, dq: Tensor) -> Start:
    """The start with columns of zeros for the inputs that a layer got later."""
    missing = dq.shape[1] - start.q0.shape[1]
    if missing <= 0 or dq.dim() > 2 or start.q0.dim() > 2:
        return start
    return start._replace(q0=torch.nn.functional.pad(start.q0, (0, missing)))
