"""Under DDP the denoiser inside the wrapper runs, and its gradients are synchronised."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import inject_adapter_in_model
from torch.nn.parallel import DistributedDataParallel

from peft_tlora import TLoraConfig

from .conftest import TinyDenoiser, perturb

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(6))
T = torch.tensor([1000, 100])  # the first process has no active rank at all


def adapted():
    torch.manual_seed(0)
    config = TLoraConfig(r=4, min_rank=0, target_modules=["to_q", "to_out"], init_seed=0)
    model = inject_adapter_in_model(config, TinyDenoiser())
    perturb(model)
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def train_one_process(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = adapted()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # a second step would stall if a parameter had taken no part in the first
        wrapped.zero_grad()
        wrapped(X[rank : rank + 1], T[rank : rank + 1]).square().sum().backward()
    torch.save(gradients(model), f"{results}/{rank}.pt")
    # as the last owner of the process group it would join gloo's thread while it holds the GIL,
    # which that thread may be waiting for (torch 2.13)
    del wrapped
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_the_mean_over_the_samples(tmp_path):
    mp.spawn(train_one_process, args=(tmp_path / "store", tmp_path), nprocs=2, daemon=True)
    model = adapted()
    model(X, T).square().sum().backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(2 * found[name], gradient, atol=1e-6, rtol=1e-4)
