"""What is made for all layers at once is what each would make for itself, whatever has changed."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.layers import batched

from .conftest import perturb

R, WIDTH, BATCH = 4, 6, 2
TIMES = {"one": 500, "on a device": torch.tensor(500), "each": torch.tensor([100, 900])}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        return x + self.conv(x.mT).mT


class Denoiser(nn.Module):
    """Three blocks and a layer that sees one row a sample."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.pooled = nn.Linear(WIDTH, WIDTH)
        self.checkpointed = None

    def forward(self, sample, timestep):
        for block in self.blocks:
            if self.checkpointed is None:
                sample = block(sample)
            else:
                sample = checkpoint(block, sample, use_reentrant=self.checkpointed)
        return sample + self.pooled(sample.mean(1))[:, None]


def adapted(**kwargs):
    torch.manual_seed(0)
    targets = ["first", "second", "conv", "pooled"]
    config = {"r": R, "min_rank": 1, "target_modules": targets, "init_seed": 0}
    config |= {"num_train_timesteps": 1000, **kwargs}
    model = get_peft_model(Denoiser(), TLoraConfig(**config)).double()
    perturb(model)
    return model


def sample():
    torch.manual_seed(1)
    return torch.randn(BATCH, 5, WIDTH, dtype=torch.float64)


def results(model, t, trained=True):
    """Output and gradients; of `trained=False` the output without a graph."""
    model.zero_grad()
    x = sample().requires_grad_(trained)
    with torch.set_grad_enabled(trained):
        output = model(x, t)
    if not trained:
        return {"output": output}
    output.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}


@pytest.fixture
def alone(monkeypatch):
    """What a model computes whose layers all see to themselves."""

    def compute(model, *args):
        with monkeypatch.context() as patched:
            patched.setattr(batched, "_take", lambda *_: None)
            return results(copy.deepcopy(model), *args)

    return compute


@pytest.fixture
def made(monkeypatch):
    """How many layers were made at a time, each time."""
    sizes, make = [], batched._make
    monkeypatch.setattr(
        batched, "_make", lambda chunk, *args: sizes.append(len(chunk)) or make(chunk, *args)
    )
    return sizes


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("small", [True, False])
def test_together_they_compute_what_each_does_alone(
    alone, made, monkeypatch, ortho, kind, trained, small
):
    monkeypatch.setattr("peft_tlora.layers.update._SMALL", 2**15 if small else 0)
    model, t = adapted(ortho_init=ortho), TIMES[kind]
    if kind == "each":  # a convolution and the layer of pooled tokens see no tokens
        assert model(sample(), t).shape == sample().shape
        made.clear()
    torch.testing.assert_close(results(model, t, trained), alone(model, t, trained))
    assert sorted(made) == [3, 7]  # the convolutions, and the linear layers with the pooled one


def test_megabytes_are_made_at_a_time(alone, made, monkeypatch):
    model = adapted()
    monkeypatch.setattr(batched, "_CHUNK", 2 * 2 * (2 * R * WIDTH + R) * 8)  # of two linear layers
    torch.testing.assert_close(results(model, 500), alone(model, 500))
    assert sorted(made) == [1] * 4 + [2] * 3


def weights_of(model, part="lora_A"):
    return [p for n, p in model.named_parameters() if part in n]


def in_place(model):
    with torch.no_grad():
        for weight in (*weights_of(model), *weights_of(model, "lora_lambda")):
            weight.mul_(2)


def by_data(model):
    for weight in weights_of(model, "lora_B"):
        weight.data = 2 * weight.data


def a_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(sample(), 500).square().sum().backward()
    optimizer.step()


def loading(model):
    state = {n: 1.5 * t for n, t in model.state_dict().items() if "lora_A." in n}
    model.load_state_dict(state, strict=False)


def another_base(model):
    with torch.no_grad():
        for block in model.base_model.model.blocks:
            block.first.base_layer.weight.add_(1)


def merging(model):
    with timestep_context(model, 300):
        model.merge_adapter()


def merging_and_back(model):
    merging(model)
    model.unmerge_adapter()


def another_adapter(model):
    model.add_adapter(
        "other", TLoraConfig(r=2, target_modules=["first"], init_seed=1, num_train_timesteps=1000)
    )
    model.double()
    model.set_adapter("other")
    perturb(model)


def deleting_an_adapter(model):
    another_adapter(model)
    model.delete_adapter("default")


def casting(model):
    model.base_model.model.float()
    model.double()


def scaling(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


def a_hook_below(model):
    block = model.base_model.model.blocks[1]
    block.first.lora_A["default"].register_forward_hook(lambda m, args, output: 2 * output)


def a_hook_above(model):
    """As an engine has it that brings weights where the module is called."""

    def change(module, args):
        module.first.lora_A["default"].weight.data.fill_(0.1)

    model.base_model.model.blocks[2].register_forward_pre_hook(change)


def a_forward_of_its_own(model):
    layer = model.base_model.model.blocks[0].second.base_layer
    layer.forward = lambda x, forward=layer.forward: 2 * forward(x)


def another_layer(model):
    blocks = model.base_model.model.blocks
    blocks[1].second = nn.Linear(WIDTH, WIDTH).double()


class Wrapper(nn.Module):
    """As an engine has it: the weights come when it is called."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        self.module.first.lora_A["default"].weight.data.fill_(0.1)
        return self.module(*args)


def a_wrapped_block(model):
    blocks = model.base_model.model.blocks
    blocks[1] = Wrapper(blocks[1])


CHANGES = [
    a_wrapped_block,
    in_place,
    by_data,
    a_step,
    loading,
    another_base,
    merging,
    merging_and_back,
    another_adapter,
    deleting_an_adapter,
    casting,
    scaling,
    a_hook_below,
    a_hook_above,
    a_forward_of_its_own,
    another_layer,
]


@pytest.mark.filterwarnings("ignore:Merging a T-LoRA adapter", "ignore:Already found")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_stale(alone, change, trained):
    model = adapted()
    before = results(model, 500, trained)["output"]
    change(model)
    found = results(model, 500, trained)
    torch.testing.assert_close(found, alone(model, 500, trained))
    unchanged = torch.allclose(found["output"], before, rtol=1e-4)
    assert unchanged == (change in (merging_and_back, casting))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_recomputed_blocks_have_the_plain_gradients(monkeypatch, small, kind, reentrant):
    monkeypatch.setattr("peft_tlora.layers.update._SMALL", 2**15 if small else 0)
    model = adapted()
    expected = results(model, TIMES[kind])
    model.base_model.model.checkpointed = reentrant
    torch.testing.assert_close(results(model, TIMES[kind]), expected)


def test_a_backward_may_come_twice_and_in_parts(monkeypatch):
    monkeypatch.setattr("peft_tlora.layers.update._SMALL", 0)  # what is made again
    model = adapted()
    output = model(sample(), 500)
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(output.sum(), parameters, retain_graph=True)
    part = torch.autograd.grad(output.sum(), parameters[-2:], retain_graph=True)
    again = torch.autograd.grad(output.sum(), parameters)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(part, first[-2:])


@pytest.mark.parametrize("part", ["lora_A", "lora_lambda", "base_layer"])
@pytest.mark.parametrize("small", [True, False])
def test_a_change_between_forward_and_backward_is_found_out(monkeypatch, small, part):
    monkeypatch.setattr("peft_tlora.layers.update._SMALL", 2**15 if small else 0)
    model = adapted()
    output = model(sample().requires_grad_(), 500)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if f"second.{part}" in n).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_context_of_a_part_of_the_forward_holds(alone):
    model = adapted()
    block = model.base_model.model.blocks[1]
    forward = Block.forward

    def inside(x):
        with timestep_context(model, 990):
            return forward(block, x)

    expected = results(model, 500)["output"]
    block.forward = inside
    found = results(model, 500)["output"]
    assert not torch.allclose(found, expected)
    del block.forward

    class Inside(Block):
        def forward(self, x):
            return inside(x)

    block.__class__ = Inside  # not watched: nothing tells that more is done
    torch.testing.assert_close(results(model, 500)["output"], found)


def test_nothing_is_held_after_a_forward():
    model = adapted()
    state = model.base_model.model.pooled.timestep_state
    model(sample(), 500)
    assert state._thread.running.forward is None
    with pytest.raises(RuntimeError):
        model(sample()[..., 1:], 500)
    assert state._thread.running.forward is None


def test_an_outer_gradient_is_that_of_each_layer_alone(alone, monkeypatch):
    """A gradient penalty: the derivative of a derivative."""

    def penalty(model):
        x = sample().requires_grad_()
        output = model(x, TIMES["each"])
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        model.zero_grad()
        gradient.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = adapted()
    found = penalty(model)
    monkeypatch.setattr(batched, "_take", lambda *_: None)
    torch.testing.assert_close(penalty(model), found)
