"""What torch doesn't tell in public: whether functional transforms are at work."""

import torch
from torch.autograd import forward_ad


def has_transforms() -> bool:
    """Whether a derivative of forward mode or a transform of `torch.func` is being computed.

    An autograd function with a backward alone doesn't take part in these.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
