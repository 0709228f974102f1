"""What torch doesn't tell in public, and what its sharded tensors ask for."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate


def has_transforms() -> bool:
    """Whether a derivative of forward mode or a transform of `torch.func` is being computed.

    An autograd function with a backward alone doesn't take part in these.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether what runs becomes a graph or a transform, so that no tensor may be read or kept."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or has_transforms()


def is_sharding(module: torch.nn.Module) -> bool:
    """Whether a module is a wrapper of torch's first FSDP, which gathers weights when called."""
    return type(module).__module__.startswith("torch.distributed.fsdp.")


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, to be used with one that may be sharded over them."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def current_device() -> int | None:
    """Index of the accelerator that this thread works on, None where there is but the host.

    Threads of `nn.DataParallel` and of autograd have one each.
    """
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def next_sequence_number() -> int:
    """The number that the next autograd node of this thread will have."""
    return torch.autograd._get_sequence_nr()


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() != -1


def backward_sequence_number() -> int | None:
    """The number of the autograd node whose backward runs now, None outside of one."""
    if not in_backward():
        return None
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
