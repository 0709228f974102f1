"""What becomes a graph or a transform has the mask of its own timestep, or is refused."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap

from .conftest import TinyDenoiser, adapted


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
@pytest.mark.parametrize("t", [torch.tensor(200), torch.tensor([200, 600])])
def test_a_trace_follows_the_timestep_that_it_is_given(t):
    model, x = adapted().eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x, t), check_trace=False)
        for other in (t, 1000 - t, t * 0):
            torch.testing.assert_close(traced(x, other), model(x, other))
        assert not torch.allclose(traced(x, t), model(x, t * 0))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_a_trace_that_would_fix_the_mask_is_refused():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = adapted()

        def forward(self, x):
            return self.model(x, 500)

    with pytest.raises(ValueError, match=r"jit\.trace would fix the timestep 500"):
        torch.jit.trace(Fixed(), (torch.randn(2, 3, 8),), check_trace=False)


class Scaled(TinyDenoiser):
    def forward(self, x, timestep):
        return self.to_out(torch.tanh(self.to_q(x * timestep / 1000)))


@pytest.mark.parametrize("kind", [int, float])
def test_timesteps_as_python_numbers_compile_as_often_as_the_model_does(kind):
    """A number is first a constant of the graph and then a symbol, in torch itself."""
    counts = []
    for model in (Scaled(), adapted(Scaled())):
        torch._dynamo.reset()
        counter, x = CompileCounter(), torch.randn(2, 3, 8)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for t in map(kind, (900, 500, 100, 3)):
            torch.testing.assert_close(compiled(x, t), model(x, t))
        counts.append(counter.frame_count)
    assert counts[1] == counts[0] <= 2


@pytest.mark.parametrize("t", [300, torch.tensor(300)])
def test_gradients_by_sample_are_those_of_each_sample(t):
    model = adapted().eval()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(4, 3, 8)

    def loss(trained, sample):
        return functional_call(model, trained, (sample[None], t)).square().sum()

    found = vmap(grad(loss), (None, 0))(trained, x)
    for i, sample in enumerate(x):
        for name, gradient in grad(loss)(trained, sample).items():
            torch.testing.assert_close(found[name][i], gradient, atol=1e-5, rtol=1e-4)


def test_gradients_by_sample_follow_a_timestep_a_sample():
    model = adapted().eval()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x, t = torch.randn(3, 3, 8), torch.tensor([1000, 500, 0])

    def loss(trained, sample, t):
        return functional_call(model, trained, (sample[None], t[None])).square().sum()

    found = vmap(grad(loss), (None, 0, 0))(trained, x, t)
    lam = next(gradient for name, gradient in found.items() if "lora_lambda" in name)
    assert [(each != 0).sum().item() for each in lam] == [1, 2, 4]
