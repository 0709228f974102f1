"""Parameters, and the most memory that a training and a denoising step of SDXL's U-Net take.

    python benchmarks/memory.py [--ranks 16 64]

On a CPU the bytes of all live tensors are counted, on a GPU the allocator is asked. The models,
their gradients and the state of AdamW are included.
"""

import argparse
import weakref

import torch
from measure import device, report
from peers import PEERS, Adapted
from sdxl import TARGETS, inputs, unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they die."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()
        for tensor in tensors:
            self.watch(tensor)

    def watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, size)

    def forget(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return output


def steps(peer: str, r: int, train: bool) -> tuple[int, int, int]:
    """Trained and all elements of an adapter, and the peak of two steps in bytes."""
    full = device().type == "cuda"
    dtype = torch.bfloat16 if full else torch.float32
    torch.manual_seed(0)
    model = unet(full)
    before = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    model.to(dtype).to(device())  # pyright: ignore[reportArgumentType]
    adapted = Adapted(peer, model, r, TARGETS)
    adapted.set_mask(500)
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(parameter.numel() for parameter in adapted.parameters)
    optimizer = torch.optim.AdamW(adapted.parameters) if train and trained else None
    arguments = inputs(model, 1 if train else 2, dtype)

    def run() -> None:
        for _ in range(2):
            with torch.set_grad_enabled(train):
                output = model(timestep=torch.tensor(500.0, device=device()), **arguments).sample
            if optimizer is not None:
                output.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    if full:
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        with LiveBytes(tensors) as counter:
            run()
        peak = counter.peak
    return trained, sum(tensor.numel() for tensor in tensors) - before, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    rows = []
    for r in parser.parse_args().ranks:
        peaks: dict[tuple[str, bool], int] = {}
        for peer in PEERS:
            for train in (True, False):
                trained, elements, peaks[peer, train] = steps(peer, r, train)
            columns = [r, peer, f"{trained / 1e6:.2f} M", f"{elements / 1e6:.2f} M"]
            rows.append([*columns, peaks[peer, True], peaks[peer, False]])
        for row in rows[-len(PEERS) :]:
            for column, train in ((4, True), (5, False)):
                share = row[column] / peaks["LoRA", train]
                row[column] = f"{row[column] / 2**20:.0f} MiB, {share:.3f}"
        rows[-len(PEERS)][4] = "-"  # the base has nothing to train
    head = ["r", "adapter", "trained", "all elements", "training peak", "denoising peak"]
    report(
        "memory", "Memory of SDXL's U-Net and an adapter", head, rows, "Behind the comma: / LoRA's."
    )


if __name__ == "__main__":
    main()
