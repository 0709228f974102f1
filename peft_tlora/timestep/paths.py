"""Paths into the arguments of a function, such as `video.sigma` or `timesteps[0]`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def root_of(argument: str) -> str:
    """The name at the beginning of a path such as `video.sigma` or `timesteps[0]`."""
    return re.split(r"[.\[]", argument, maxsplit=1)[0]


def follow_path(argument: str, root: Any) -> Any:
    """What a path leads to from the value of the name at its beginning; None if nothing is there.

    Attributes and, of mappings and sequences, elements.
    """
    for dot, attribute, element in re.findall(r"(\.)(\w+)|\[([^\]]+)\]", argument):
        if root is None:
            return None
        if dot:
            root = getattr(root, attribute, None)
        elif isinstance(root, Mapping):
            root = root.get(element.strip("'\""))
        elif isinstance(root, (Sequence, Tensor)):
            root = root[int(element)] if int(element) < len(root) else None
        else:
            return None
    return root
