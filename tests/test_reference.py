"""The layers against the paper's formula, written out naively."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_tlora import TLoraConfig, timestep_context

from .conftest import perturb

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
R, MIN_RANK, ALPHA = 6, 2, 3
LAYERS = {
    "Linear": (lambda: nn.Linear(10, 7), (4, 5, 10)),
    "Linear without tokens": (lambda: nn.Linear(10, 7), (4, 10)),
    "Linear with more axes": (lambda: nn.Linear(10, 7), (4, 2, 3, 10)),
    "Conv1D of transformers": (lambda: Conv1D(7, 10), (4, 5, 10)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 4, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 4, 5, 5)),
    "Conv2d 1x1": (lambda: nn.Conv2d(8, 6, 1), (4, 8, 5, 5)),
    "Conv2d strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1)), (4, 4, 7, 6)),
    "Conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (4, 4, 7, 7)),
    "Conv2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        (4, 4, 5, 5),
    ),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (4, 4, 3, 3, 3)),
}


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def paper_rank(t):
    return math.floor((1000 - t) / 1000 * (R - MIN_RANK)) + MIN_RANK


def naive_output(layer, x, t, ortho):
    """W x + s (P diag(lam m) Q - P0 diag(lam0 m) Q0) x for one sample, in float64."""
    mask = torch.zeros(R, dtype=torch.float64)
    mask[: paper_rank(t)] = 1
    one = torch.ones(R, dtype=torch.float64)
    q, p = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    branches = [(q, one, p, 1)]
    if ortho:  # the modules hold differences from the frozen factors
        q0, p0, lam0 = (factor.double() for factor in layer.start("default"))
        lam = lam0 + layer.lora_lambda["default"].weight
        branches = [(q0 + q, lam[:, 0], p0 + p, 1), (q0, lam0[:, 0], p0, -1)]
    base = layer.get_base_layer()
    x = x.double()[None]

    def apply(up, values, columns):
        """A convolution moves like the base layer; the up-projection is 1x1 in its groups."""
        if not isinstance(base, nn.modules.conv._ConvNd):
            return x @ columns.double().T @ torch.diag(values) @ up.double().T
        down = copy.deepcopy(base).double()
        down.groups, down.bias = 1, None
        down.weight = nn.Parameter(columns.double())
        hidden = down(x) * values.view(1, R, *(1,) * (x.dim() - 2))
        conv = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
        return conv[x.dim()](hidden, up.double(), groups=base.groups)

    result = copy.deepcopy(base).double()(x)
    for columns, lam, up, sign in branches:
        result = result + sign * ALPHA / R * apply(up, lam.double() * mask, columns)
    return result[0]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_equals_the_formula_for_uniform_and_per_sample_timesteps(name, dtype, ortho):
    make, shape = LAYERS[name]
    config = TLoraConfig(
        r=R,
        lora_alpha=ALPHA,
        min_rank=MIN_RANK,
        target_modules=["layer"],
        ortho_init=ortho,
        fan_in_fan_out=name.startswith("Conv1D"),
    )
    model = get_peft_model(Holder(make().to(dtype)), config)
    perturb(model)
    x = torch.randn(shape).to(dtype)
    samples = torch.tensor([1000, 700, 250, 0])
    outputs = {}
    with torch.no_grad():
        for t in (0, 400, 1000, samples):
            with timestep_context(model, t):
                outputs[t if isinstance(t, int) else "samples"] = model(x)
        layer = model.base_model.model.layer
        for t, output in outputs.items():
            times = samples.tolist() if t == "samples" else [t] * len(x)
            expected = [naive_output(layer, row, s, ortho) for row, s in zip(x, times, strict=True)]
            expected = torch.stack(expected)
            error = (output.double() - expected).abs().max() / expected.abs().max()
            assert output.dtype == dtype
            assert error < TOLERANCE[dtype], f"t={t}: relative error {error:.1e}"
    assert not torch.equal(outputs[0], outputs[1000])


def test_the_gradients_equal_those_of_the_formula():
    torch.manual_seed(0)
    config = TLoraConfig(
        r=R, lora_alpha=ALPHA, min_rank=MIN_RANK, target_modules=["layer"], init_seed=0
    )
    model = get_peft_model(Holder(nn.Linear(10, 7)), config).double()
    perturb(model)
    layer = model.base_model.model.layer
    x = torch.randn(1, 5, 10, dtype=torch.float64)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with timestep_context(model, 500):
        found = torch.autograd.grad(model(x).square().sum(), parameters)
    naive = naive_output(layer, x[0], 500, True)
    expected = torch.autograd.grad(naive.square().sum(), parameters)
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_per_token_timesteps_mask_each_token():
    config = TLoraConfig(r=R, lora_alpha=ALPHA, min_rank=MIN_RANK, target_modules=["layer"])
    model = get_peft_model(Holder(nn.Linear(10, 7)), config)
    perturb(model)
    x, t = torch.randn(2, 3, 10), torch.tensor([[0, 400, 1000], [1000, 1000, 100]])
    layer = model.base_model.model.layer
    with torch.no_grad():
        with timestep_context(model, t):
            tokens, other_axis = model(x), model(x[:, :1])
        for b in range(2):
            for s in range(3):
                expected = naive_output(layer, x[b, s], t[b, s].item(), True)
                torch.testing.assert_close(tokens[b, s].double(), expected, atol=2e-6, rtol=1e-5)
            # where the token axis differs, the noisiest token stands for the sample
            expected = naive_output(layer, x[b, 0], t[b].max().item(), True)
            torch.testing.assert_close(other_axis[b, 0].double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_takes_the_steps_that_whole_factors_take(optimizer):
    """Q, P and lam as parameters of their own, as the paper has them, without weight decay."""
    config = TLoraConfig(r=R, lora_alpha=R, min_rank=MIN_RANK, target_modules=["layer"])
    model = get_peft_model(Holder(nn.Linear(10, 7)), config).double()
    layer = model.base_model.model.layer
    base, start = layer.base_layer, layer.start("default")
    whole = [nn.Parameter(factor.clone()) for factor in start]

    def paper(x, t):
        mask = torch.arange(R) < paper_rank(t)
        (q, p, lam), (q0, p0, lam0) = whole, start
        update = p @ torch.diag(lam[:, 0] * mask) @ q - p0 @ torch.diag(lam0[:, 0] * mask) @ q0
        return base(x) + x @ update.T

    ours = [getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B", "lora_lambda")]
    optimizers = [optimizer(factors, lr=1e-3, weight_decay=0) for factors in (ours, whole)]
    for step in range(50):
        x, y = torch.randn(2, 4, 10, dtype=torch.float64)
        t = 20 * step
        with timestep_context(model, t):
            losses = [(output - y[:, :7]).square().mean() for output in (model(x), paper(x, t))]
        for each, loss in zip(optimizers, losses, strict=True):
            each.zero_grad()
            loss.backward()
            each.step()
    for difference, factor, first in zip(ours, whole, start, strict=True):
        moved = factor - first
        assert (difference - moved).norm() <= 1e-12 * moved.norm()
