import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_tlora import TLoraConfig, orthogonality_loss

from .conftest import TinyDenoiser, perturb


def adapted(**fields):
    config = TLoraConfig(**{"r": 4, "target_modules": ["to_q", "to_out"], **fields})
    return get_peft_model(TinyDenoiser(), config)


def naive(layer, adapter="default"):
    """Sum of squares of each entry of P^T P - I and Q Q^T - I."""
    total = 0.0
    q, p, _ = layer.tlora_variant(adapter).factors(layer, adapter).whole()
    for rows in (p.T.tolist(), q.tolist()):
        for i, one in enumerate(rows):
            for j, two in enumerate(rows):
                dot = sum(a * b for a, b in zip(one, two, strict=True))
                total += (dot - (i == j)) ** 2
    return total


def test_it_is_the_reference_formula():
    model = adapted()
    perturb(model)
    layers = (model.base_model.model.to_q, model.base_model.model.to_out)
    expected = sum(naive(layer) for layer in layers)
    assert orthogonality_loss(model).item() == pytest.approx(expected, rel=1e-5)
    injected = model.base_model.model
    assert orthogonality_loss(injected).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_it_is_zero_at_an_orthogonal_initialisation_also_of_small_and_grouped_layers():
    model = nn.ModuleDict(
        {
            "small": nn.Linear(8, 3),
            "grouped": nn.Conv2d(8, 12, 3, groups=2),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    config = TLoraConfig(r=4, target_modules=list(model))
    with pytest.warns(UserWarning, match="r exceeds the smaller dimension of 1 layers: small"):
        model = get_peft_model(model, config)
    assert orthogonality_loss(model).item() < 1e-3  # the frozen factors have 8 significant bits
    perturb(model)
    assert orthogonality_loss(model).item() > 0.1


def test_its_gradient_makes_the_factors_orthonormal_again():
    model = adapted()
    perturb(model, 0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = orthogonality_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


def test_it_is_of_the_active_adapters_unless_named():
    model = adapted()
    model.add_adapter("other", TLoraConfig(r=2, target_modules=["to_q"]))
    layer = model.base_model.model.to_q
    layer.lora_B["other"].weight.data += layer.start("other").p0  # P is twice what it was
    assert orthogonality_loss(model).item() < 1e-3
    found = orthogonality_loss(model, ["other"]).item()
    assert found == pytest.approx(naive(layer, "other"), rel=1e-5)


def test_an_adapter_without_singular_values_is_refused():
    with pytest.raises(ValueError, match="not defined for ortho_init=None"):
        orthogonality_loss(adapted(ortho_init=None))
    with pytest.raises(ValueError, match=r"adapter named \['nine'\]"):
        orthogonality_loss(adapted(), ["nine"])
