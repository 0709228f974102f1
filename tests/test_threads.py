"""A forward's timestep belongs to its thread, and comes back after a forward inside it."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_tlora import active_rank, timestep_context
from peft_tlora.schedule import RankSchedule
from peft_tlora.timestep import range as value_range
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser

from .conftest import TinyDenoiser, adapted, ranks_seen

TIMES = (0, 400, 700, 1000)


class Meeting(TinyDenoiser):
    """Its forwards wait for each other after the hook, before the layers."""

    barrier: threading.Barrier | None = None

    def forward(self, x, timestep):
        if self.barrier is not None:
            self.barrier.wait(30)
        return super().forward(x, timestep)


def output(model, t):
    with torch.no_grad():
        return model(torch.ones(1, 3, 8), t)


@pytest.mark.parametrize("by_context", [False, True])
def test_threads_that_share_a_model_have_masks_of_their_own(by_context):
    model = adapted(Meeting())

    def run(t):
        if by_context:
            with timestep_context(model, t):
                return output(model, 500)
        return output(model, t)

    expected = [run(t) for t in TIMES]
    assert not any(torch.allclose(expected[0], other) for other in expected[1:])
    model.base_model.model.barrier = threading.Barrier(len(TIMES))
    with ThreadPoolExecutor(len(TIMES)) as pool:
        for found, want in zip(pool.map(run, TIMES), expected, strict=True):
            assert torch.equal(found, want)


def test_a_forward_inside_a_forward_gives_the_outer_one_its_timestep_back():
    class Nested(TinyDenoiser):
        inner = None

        def forward(self, x, timestep):
            if self.inner is None:
                return super().forward(x, timestep)
            inner, self.inner = self.inner, None
            with torch.no_grad():
                self(x, inner)
            result = super().forward(x, timestep)
            self.inner = inner
            return result

    model = adapted(Nested())
    x = torch.randn(2, 3, 8)
    expected = ranks_seen(model, x, torch.tensor(700))
    model.base_model.model.inner = torch.tensor(0)
    assert ranks_seen(model, x, torch.tensor(700)) == expected
    assert set(expected.values()) == {active_rank(700, 4, 1)}


def test_replicas_that_share_the_hook_have_masks_of_their_own():
    """As nn.DataParallel runs them: shallow copies of a module, each in a thread."""
    model = adapted(Meeting())
    expected = [output(model, t) for t in TIMES]
    replica = model._replicate_for_data_parallel()
    assert replica is not model
    model.base_model.model.barrier = threading.Barrier(len(TIMES))
    replicas = [model, *(_replica(model) for _ in TIMES[1:])]
    results: dict[int, torch.Tensor] = {}

    def run(i):
        results[i] = output(replicas[i], TIMES[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(TIMES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        assert torch.equal(results[i], want)


def _replica(module: nn.Module) -> nn.Module:
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _replica(child)
    for name, parameter in module._parameters.items():
        replica._parameters[name] = parameter
    return replica


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.Linear(8, 8)

    def forward(self, x, timestep):
        return checkpoint(lambda x: self.to_out(torch.tanh(self.to_q(x))), x, use_reentrant=False)


DENOISERS["tests:Checkpointed"] = Denoiser()


def test_a_recomputation_finds_the_forward_of_its_own_thread():
    def train(model, t):
        output = model(torch.ones(1, 3, 8, requires_grad=True), torch.tensor(t))
        barrier.wait(30)  # all forwards have run before the first backward
        output.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.manual_seed(0)
    base = Checkpointed()
    barrier = threading.Barrier(1)
    expected = []
    for t in TIMES:
        model = adapted(_copy(base))
        expected.append(train(model, t))
    shared = adapted(_copy(base))
    barrier = threading.Barrier(len(TIMES))

    def losses(t):
        output = shared(torch.ones(1, 3, 8, requires_grad=True), torch.tensor(t))
        barrier.wait(30)
        trained = [p for p in shared.parameters() if p.requires_grad]
        return torch.autograd.grad(output.square().sum(), trained)

    with ThreadPoolExecutor(len(TIMES)) as pool:
        for found, want in zip(pool.map(losses, TIMES), expected, strict=True):
            torch.testing.assert_close(list(found), want)


def _copy(base):
    copy = Checkpointed()
    copy.load_state_dict(base.state_dict())
    return copy


def test_a_backward_in_another_thread_finds_the_only_forward():
    model = adapted(Checkpointed())
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss():
        x = torch.ones(1, 3, 8, requires_grad=True)
        return model(x, torch.tensor(700)).square().sum()

    expected = torch.autograd.grad(loss(), trained)
    value = loss()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, value, trained).result()
    torch.testing.assert_close(found, expected)


def test_a_context_of_another_thread_is_no_silent_mask():
    model = adapted(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"])
    with timestep_context(model, 1000), ThreadPoolExecutor(1) as pool:
        with pytest.warns(UserWarning, match="in another thread"):
            pool.submit(model, torch.randn(1, 8)).result()


def test_no_thread_leaves_anything_behind():
    model = adapted()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda t: output(model, t), TIMES * 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.base_model.model.to_q(torch.randn(1, 8))
    assert any("ran without a timestep" in str(w.message) for w in caught)


def test_the_check_of_the_values_survives_another_thread_inside(monkeypatch):
    watch, original = value_range.TimestepRange("Net"), value_range._tensor

    def interrupted(value):
        if value.is_floating_point():
            watch._only_fractions = False  # what the other thread has found out by now
        return original(value)

    monkeypatch.setattr(value_range, "_tensor", interrupted)
    watch._only_fractions = torch.tensor(True)
    assert watch.complaint(torch.tensor(0.5), RankSchedule(4), None) is None
