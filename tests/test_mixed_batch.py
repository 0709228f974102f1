"""`adapter_names`: each sample of a batch with its own adapter and its own timestep."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_tlora import TLoraConfig

from .conftest import TinyDenoiser, perturb, tiny_unet

NAMES = ["one", "__base__", "two", "one", "two"]


def adapters(base, targets, **fields):
    torch.manual_seed(0)
    one = TLoraConfig(r=4, min_rank=1, lora_alpha=6, target_modules=targets, **fields)
    two = TLoraConfig(
        r=8, min_rank=2, target_modules=targets[:1], rank_schedule="cosine", ortho_init=None
    )
    model = get_peft_model(base, one, adapter_name="one")
    model.add_adapter("two", two)
    perturb(model)
    return model.eval()


@torch.no_grad()
def one_by_one(model, run):
    """Each sample run alone with its adapter."""
    outputs = []
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(run(slice(i, i + 1)))
        else:
            model.set_adapter(name)
            outputs.append(run(slice(i, i + 1)))
    return torch.cat(outputs)


@pytest.mark.parametrize("timesteps", [[1000, 800, 600, 100, 300], [700] * 5, [700]])
@pytest.mark.parametrize("ortho", ["last", None])
def test_each_sample_has_its_adapters_mask_at_its_timestep(timesteps, ortho):
    model = adapters(TinyDenoiser(), ["to_q", "to_out"], ortho_init=ortho)
    x, t = torch.randn(5, 3, 8), torch.tensor(timesteps)
    each = t.expand(5)
    expected = one_by_one(model, lambda i: model(x[i], each[i]))
    with torch.no_grad():
        mixed = model(x, t, adapter_names=NAMES)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_a_unet_mixes_in_its_convolutions_and_attention():
    model = adapters(tiny_unet(), ["conv1", "to_k", "to_v"])
    x, e = torch.randn(5, 4, 8, 8), torch.randn(5, 3, 16)
    t = torch.tensor([1000, 800, 600, 100, 300])
    expected = one_by_one(model, lambda i: model(x[i], t[i], e[i]).sample)
    with torch.no_grad():
        mixed = model(x, t, e, adapter_names=NAMES).sample
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


def test_plain_lora_mixes_with_t_lora():
    model = TinyDenoiser().eval()
    tlora = TLoraConfig(r=4, min_rank=1, target_modules=["to_q"], init_lora_weights=False)
    inject_adapter_in_model(tlora, model, adapter_name="masked")
    plain = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(plain, model, adapter_name="plain")
    layer, x = model.to_q, torch.randn(3, 3, 8)
    names = ["masked", "plain", "__base__"]
    layer.timestep_state.begin_forward(torch.tensor([1000, 0, 0]))
    mixed = layer(x, adapter_names=names)
    for i, name in enumerate(names):
        layer.timestep_state.begin_forward(torch.tensor(1000))
        expected = layer.base_layer(x[i])
        if name != "__base__":
            layer.set_adapter(name)
            expected = layer(x[i : i + 1])[0]
        torch.testing.assert_close(mixed[i], expected, atol=1e-5, rtol=1e-5)


def test_misuse_is_refused_as_by_lora():
    model = adapters(TinyDenoiser(), ["to_q", "to_out"])
    x, t = torch.randn(5, 3, 8), torch.tensor(100)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, t, adapter_names=["three"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, t, adapter_names=["one"] * 4)
    attention = get_peft_model(
        nn.Sequential(nn.MultiheadAttention(8, 2)), TLoraConfig(r=4, target_modules=["0"])
    )
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        attention.base_model.model[0](x, x, x, adapter_names=["default"] * 5)
