"""The update of a linear layer: its two forms, their backward, and when which is used."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.functional import Factors
from peft_tlora.layers import unquantized as module_of_layers
from peft_tlora.layers import update as module_of_updates
from peft_tlora.layers.linear import adapted_linear, add_update
from peft_tlora.layers.update import Mask, Masked

from .conftest import perturb

R, IN, OUT = 4, 6, 5


@pytest.fixture(autouse=True, params=[True, False], ids=["small", "large"])
def small(request, monkeypatch):
    """Whether a layer keeps for its backward what a large one makes again."""
    monkeypatch.setattr(module_of_updates, "_SMALL", IN * OUT if request.param else 0)
    return request.param


def factors_of(ortho, dtype=torch.float64):
    """Differences from a start, and the start; without one, whole factors."""
    torch.manual_seed(0)
    q, p = torch.randn(R, IN, dtype=dtype), torch.randn(OUT, R, dtype=dtype)
    frozen = [q, p, torch.rand(R, 1, dtype=dtype)] if ortho else []
    trained = [0.1 * torch.randn_like(t) for t in frozen] if ortho else [q, p]
    return [t.requires_grad_() for t in trained] + frozen


def mask_of(kind, ortho, dtype=torch.float64):
    """A mask times a scaling of 0.5, and the same as (..., r)."""
    if kind == "number":
        return Mask(0.5), torch.full((R,), 0.5, dtype=dtype)
    own = 0.5 * torch.tensor([1.0, 1, 1, 0], dtype=dtype)
    if kind == "shared":
        return Mask(own[:, None]), own
    own = torch.stack([own, 0.5 * torch.tensor([1.0, 0, 0, 0], dtype=dtype)])[:, None]
    return Mask(gate=torch.cat([own, own], dim=-1) if ortho else own), own


def masked(factors, mask, dtype=torch.float64, rows=3):
    """The update of an input with so many rows a sample."""
    if mask.gate is not None:
        gate = mask.gate.repeat(1, rows, 1).flatten(0, 1)
        half = gate[:, :R]
        mask = mask._replace(rows=gate, half=half)
    return Masked(Factors(*factors), mask, dtype)


def naive(result, x, factors, own):
    """s (P diag(lam m) Q - P0 diag(lam0 m) Q0) x, term by term, with m s of shape (..., r)."""
    if len(factors) == 2:
        return result + linear(linear(x, factors[0]) * own, factors[1])
    q0, p0, lam0 = factors[3:]
    q, p, lam = (start + moved for start, moved in zip(factors[3:], factors[:3], strict=True))
    trained, frozen = linear(x, q) * lam[:, 0] * own, linear(x, q0) * lam0[:, 0] * own
    return result + linear(trained, p) - linear(frozen, p0)


@pytest.mark.parametrize("first", [1, 3, R])
@pytest.mark.parametrize("ortho", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_ranks_that_are_not_computed_are_as_masked_ones(first, ortho, rows):
    factors, columns = factors_of(ortho), torch.arange(R) < first
    x = torch.randn(2, rows, IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    expected = naive(linear(x, weight), x, factors, 0.5 * columns.double())
    leading = masked(factors, Mask(0.5, ranks=first))
    outputs = (
        add_update(linear(x, weight), x, leading),
        adapted_linear(x, weight, None, leading),
    )
    inputs = [x, *(t for t in factors if t.requires_grad)]
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    for output in outputs:
        torch.testing.assert_close(output, expected)
        found = torch.autograd.grad(output.square().sum(), inputs)
        torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("ortho", [True, False])
@pytest.mark.parametrize("kind", ["number", "shared", "per sample"])
def test_added_to_the_output_it_is_the_formula_with_its_derivatives(kind, ortho):
    factors, (mask, own) = factors_of(ortho), mask_of(kind, ortho)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    result = torch.randn(2, 3, OUT, dtype=torch.float64, requires_grad=True)

    def update(result, x, *factors):
        return add_update(result, x, masked(factors, mask))

    torch.testing.assert_close(update(result, x, *factors), naive(result, x, factors, own))
    assert gradcheck(update, (result, x, *factors))
    assert gradgradcheck(update, (result, x, *factors))


@pytest.mark.parametrize("ortho", [True, False])
@pytest.mark.parametrize("kind", ["number", "shared", "per sample"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_with_the_base_layer_it_is_the_formula_with_its_derivatives(kind, ortho, rows, bias):
    factors, (mask, own) = factors_of(ortho), mask_of(kind, ortho)
    x = torch.randn(2, rows, IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    bias = torch.randn(OUT, dtype=torch.float64) if bias else None

    def output(x, *factors):
        return adapted_linear(x, weight, bias, masked(factors, mask, rows=rows))

    expected = naive(linear(x, weight, bias), x, factors, own)
    torch.testing.assert_close(output(x, *factors), expected)
    with torch.no_grad():
        torch.testing.assert_close(output(x, *factors), expected)
    assert gradcheck(output, (x, *factors))
    assert gradgradcheck(output, (x, *factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ortho", [True, False])
def test_its_error_is_that_of_the_dtype(dtype, ortho):
    """Against the naive formula in float64, relative to its largest term."""
    factors = [t.detach() for t in factors_of(ortho)]
    x, result = torch.randn(64, IN).to(dtype).double(), torch.randn(64, OUT).to(dtype).double()
    own = torch.full((R,), 0.5, dtype=torch.float64)
    expected = naive(result, x, factors, own)
    rounded = masked([t.float() for t in factors], Mask(0.5), dtype)
    found = add_update(result.to(dtype), x.to(dtype), rounded)
    assert found.dtype == dtype
    # of a rounding of the input, of the factors, of the hidden values and of the result
    assert (found - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()
    for adapter in (dtype, torch.float32):  # of the input's dtype, and wider
        weight = torch.randn(OUT, IN).to(dtype)
        expected = naive(linear(x, weight.double()), x, factors, own)
        rounded = rounded._replace(dtype=adapter)
        found = adapted_linear(x.to(dtype), weight, None, rounded)
        assert found.dtype == dtype
        assert (found - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.proj(x)


def adapted(**kwargs):
    torch.manual_seed(0)
    config = {"r": R, "min_rank": 1, "target_modules": ["proj"], "init_seed": 0, **kwargs}
    model = get_peft_model(Projection(), TLoraConfig(**config))
    perturb(model)
    return model, model.base_model.model.proj


def calls_of(monkeypatch, module, name):
    """The calls of a function of a module, which go on as before."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


@pytest.fixture
def at_once(monkeypatch):
    """The calls that compute a base layer together with its update."""
    return calls_of(monkeypatch, module_of_layers, "adapted_linear")


@pytest.fixture
def folded(monkeypatch):
    """The calls that add an update to a weight."""
    return calls_of(monkeypatch, module_of_updates, "delta_weight")


def results(model, x, t):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with timestep_context(model, t):
        output = model(x)
        output.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize(
    "t", [500, torch.tensor(900), torch.tensor([100, 100]), torch.tensor([100, 900])]
)
def test_the_ways_of_computing_a_layer_agree(at_once, folded, t, ortho):
    model, layer = adapted(ortho_init=ortho)
    for rows in (8, 1):
        x = torch.randn(2, rows, IN)
        found = results(model, x, t)
        assert (len(at_once), bool(folded)) == (1, rows == 8)  # many rows take the weight
        at_once.clear()
        folded.clear()
        handle = layer.base_layer.register_forward_hook(lambda *args: None)  # sees the output
        expected = results(model, x, t)
        assert not at_once
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        handle.remove()
        folded.clear()


@pytest.mark.parametrize("ortho", ["last", None])
def test_functional_transforms_work(at_once, ortho):
    """Forward-mode derivatives, as consistency models need them, and gradients of each sample."""
    model, layer = adapted(ortho_init=ortho)
    model.double()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    factors = layer.lora_variant["default"].factors(layer, "default")
    name = "base_model.model.proj.lora_A.default.weight"
    others = [t.detach() for t in factors[1:] if t is not None]
    weight, tangent = factors.dq.detach(), torch.ones_like(factors.dq)
    base, mask = layer.base_layer, torch.tensor([1.0, 1, 0, 0]) * layer.scaling["default"]

    def found(dq, x):
        return functional_call(model, {name: dq}, (x,))

    def expected(dq, x):
        return naive(linear(x, base.weight, base.bias), x, [dq, *others], mask)

    def of_each_sample(function):
        loss = lambda dq, x: function(dq, x).square().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)

    with timestep_context(model, 500):
        for transform in (
            lambda f: torch.func.jvp(lambda dq: f(dq, x), (weight,), (tangent,)),
            of_each_sample,
        ):
            torch.testing.assert_close(transform(found), transform(expected))
    assert not at_once


@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_lambda", "lora_A_init"])
def test_a_factor_that_somebody_watches_is_called(at_once, ortho, part):
    """Engines bring weights into place where a module is called, and so do users' hooks."""
    model, layer = adapted(ortho_init=ortho)
    if not ortho and part not in ("lora_A", "lora_B"):
        return
    x, seen = torch.randn(2, 3, IN), []
    expected = {str(t): results(model, x, t) for t in (900, torch.tensor([100, 900]))}
    getattr(layer, part)["default"].register_forward_hook(lambda *args: seen.append(part))
    at_once.clear()
    for t in (900, torch.tensor([100, 900])):
        torch.testing.assert_close(results(model, x, t), expected[str(t)], atol=1e-5, rtol=1e-5)
    assert len(seen) == 2
    assert not at_once


def a_dropout():
    return adapted(lora_dropout=0.1)[0], 500


def a_trained_bias():
    return adapted(bias="lora_only")[0], 500


def a_trained_weight():
    model, layer = adapted()
    layer.base_layer.weight.requires_grad_()
    return model, 500


def two_adapters():
    model, _ = adapted()
    model.add_adapter("other", TLoraConfig(r=2, target_modules=["proj"], init_seed=1))
    model.base_model.set_adapter(["default", "other"])
    perturb(model)
    return model, 500


@pytest.mark.parametrize(
    "case",
    [a_dropout, a_trained_bias, a_trained_weight, two_adapters],
    ids=lambda case: case.__name__,
)
def test_the_base_layer_runs_by_itself_where_it_must(at_once, case):
    model, t = case()
    results(model, torch.randn(2, 8, IN), t)
    assert not at_once


@pytest.mark.parametrize("case", ["autocast", "merged", "disabled"])
def test_the_base_layer_runs_by_itself_in_such_a_forward(at_once, case):
    model, _ = adapted()
    x = torch.randn(2, 8, IN)
    with timestep_context(model, 500):
        if case == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                model(x)
        elif case == "merged":
            with pytest.warns(UserWarning, match="fixes its mask"):
                model.merge_adapter()
            model(x)
        else:
            with model.disable_adapter():
                model(x)
    assert not at_once


def test_a_wrong_shape_is_still_the_base_layers_own_error():
    model, _ = adapted()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 8, IN + 1))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("ortho", ["last", None])
def test_inactive_ranks_are_not_computed_where_the_host_knows_the_timestep(small, rows, ortho):
    """But in a small layer, where it costs less to mask them."""
    model, layer = adapted(ortho_init=ortho)
    layer.lora_A["default"].weight.data[1:] = torch.nan
    with timestep_context(model, torch.tensor([1000, 1000])):
        output = model(torch.randn(2, rows, IN))
    assert bool(output.isfinite().all()) == (not small)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_backward_keeps_what_lora_keeps(small, rows):
    """Input, parameters and, unless the update was in the weight, the hidden values.

    A small layer also keeps what it would make again: the factors and the updated weight.
    """
    model, layer = adapted()
    x, kept = torch.randn(2, rows, IN), []

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with (
        timestep_context(model, 500),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(x)
    of_the_layer = [*layer.parameters(), *layer.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *of_the_layer)}
    more = [storage for storage in kept if storage.data_ptr() not in known]
    assert len(kept) > len(more)
    r = layer.lora_variant["default"].ranks.schedule.active_rank(500)
    assert r == 2
    if small:  # all ranks, masked
        hidden, factors = 2 * rows * 2 * R, [2 * R * IN, OUT * 2 * R, R * IN]
        folded = [OUT * IN, 2 * R * IN, OUT * R, R * IN]
        expected = [hidden, *factors] if rows == 1 else folded
    else:
        expected = [2 * rows * r] if rows == 1 else []
    assert [storage.nbytes() for storage in more] == [4 * numbers for numbers in expected]


class Shapes(TorchDispatchMode):
    """Notes the shape and dtype of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.made |= {(t.shape, t.dtype) for t in tree_leaves(output) if hasattr(t, "dtype")}
        return output


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_accelerator_makes_no_float32_copy_of_a_bfloat16_input(device):
    """A CPU computes in the adapter's float32, as PEFT does: few multiply bfloat16 fast."""
    model, layer = adapted(rank_schedule="constant")  # needs no timestep
    layer.base_layer.bfloat16()
    model.to(device)
    x = torch.randn(2, 8, IN, dtype=torch.bfloat16, device=device)
    with Shapes() as shapes:
        assert model(x).dtype == torch.bfloat16
    assert (((16, IN), torch.float32) in shapes.made) == (device == "cpu")


def test_autocast_gets_the_input_as_it_is():
    model, _ = adapted()
    x = torch.randn(2, 8, IN, dtype=torch.bfloat16)
    with (
        timestep_context(model, 500),
        torch.autocast("cpu", torch.bfloat16),
        Shapes() as shapes,
    ):
        model(x)
    assert not {(x.shape, torch.float32), ((16, IN), torch.float32)} & shapes.made
