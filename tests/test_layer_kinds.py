"""Every kind of layer that T-LoRA supports, through everything that PEFT does with an adapter."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.layers.layer import TLoraLayer

from .conftest import perturb


class Attention(nn.Module):
    """Self-attention with one output, as a layer of a sequential model."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Model(nn.Module):
    """A denoiser of two layers, the second of the kind under test."""

    def __init__(self, layer: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Identity()
        self.layer = layer
        self.head = nn.Linear(1, 1)

    def forward(self, x, timestep):
        return self.head(self.layer(self.first(x)).unsqueeze(-1)).squeeze(-1)


PADDED = {"padding": "same", "padding_mode": "circular"}
KINDS = {
    "linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (2, 8)),
    "smaller than the rank": (lambda: nn.Linear(8, 2), (2, 8)),
    "Conv1D": (lambda: Conv1D(6, 8), (2, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), (2, 8, 9)),
    "conv1d, dilated": (lambda: nn.Conv1d(8, 6, 3, dilation=2, padding="same"), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 1), **PADDED), (2, 8, 4, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 4, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, stride=(1, 2, 2), padding=1), (2, 4, 3, 4, 5)),
    "attention": (Attention, (2, 5, 8)),
    "attention, sequence first": (lambda: Attention(batch_first=False), (5, 2, 8)),
}  # fmt: skip
TIMES = (0, 300, 700, 1000)
GROUPED = ("conv2d, grouped", "conv2d, depthwise")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mergeable_kind = pytest.mark.parametrize("kind", [k for k in KINDS if k not in GROUPED])


def inputs(kind):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(KINDS[kind][1], generator=generator)


def base(kind):
    torch.manual_seed(0)
    return Model(KINDS[kind][0]()).eval()


def targets(kind):
    return ["attention"] if "attention" in kind else ["layer"]


def config(kind, **fields):
    return TLoraConfig(
        **{"r": 4, "lora_alpha": 6, "min_rank": 1, "target_modules": targets(kind), **fields}
    )


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """The ranks of a layer that is smaller than them warn, which is tested elsewhere."""


def adapted(kind, **fields):
    model = get_peft_model(base(kind), config(kind, **fields)).eval()
    perturb(model)
    return model


@torch.no_grad()
def outputs(model, kind, times=TIMES):
    return torch.stack([model(inputs(kind), torch.tensor(t)) for t in times])


@each_kind
@pytest.mark.parametrize("ortho", ["last", None])
def test_the_initial_adapter_is_the_identity(kind, ortho):
    model = get_peft_model(base(kind), config(kind, ortho_init=ortho)).eval()
    assert torch.equal(outputs(model, kind), outputs(base(kind), kind))


@each_kind
def test_init_lora_weights_false_is_not(kind):
    model = get_peft_model(base(kind), config(kind, init_lora_weights=False)).eval()
    assert not torch.allclose(outputs(model, kind), outputs(base(kind), kind), atol=1e-3)


@each_kind
@pytest.mark.parametrize("ortho", ["last", None])
def test_the_mask_follows_the_timestep_and_scaling_scales(kind, ortho):
    """Against a model whose ranks beyond the active ones are taken away by hand."""
    model = adapted(kind, ortho_init=ortho)
    for t, rank in ((1000, 1), (500, 2), (0, 4)):
        cut = copy.deepcopy(model)
        for layer in cut.modules():
            if isinstance(layer, TLoraLayer):
                factors = [layer.lora_A, layer.lora_lambda] if ortho else [layer.lora_A]
                factors += [layer.lora_lambda_init] if ortho else []
                for factor in factors:  # what such a rank computes ends here
                    factor["default"].weight.data[rank:] = 0
        with timestep_context(cut, 0):  # all ranks
            expected = outputs(cut, kind, [t])
        torch.testing.assert_close(outputs(model, kind, [t]), expected, atol=1e-5, rtol=1e-5)


@each_kind
def test_save_and_load_keep_every_bit(tmp_path, kind):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            base(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(outputs(loaded, kind), outputs(model, kind))


@each_mergeable_kind
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(kind, safe_merge):
    model = adapted(kind)
    before = copy.deepcopy(model.state_dict())
    for t in TIMES:
        expected = outputs(model, kind, [t])
        with timestep_context(model, t):
            model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(outputs(model, kind, [t]), expected, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, before[name], atol=1e-5, rtol=1e-5)
    with timestep_context(model, 700):
        plain = model.merge_and_unload(safe_merge=safe_merge)
    assert not [name for name in plain.state_dict() if "lora_" in name]
    expected = outputs(adapted(kind), kind, [700])
    torch.testing.assert_close(outputs(plain, kind, [700]), expected, atol=1e-5, rtol=1e-5)


@each_mergeable_kind
def test_a_broken_adapter_is_not_merged_safely(kind):
    model = adapted(kind)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(w.isfinite().all() for n, w in model.state_dict().items() if "lora_" not in n)


@pytest.mark.parametrize("kind", GROUPED)
def test_peft_refuses_to_merge_grouped_convolutions(kind):
    with pytest.raises(NotImplementedError, match="groups > 1"):
        adapted(kind).merge_adapter()


@each_kind
def test_disable_and_unload_give_the_base(kind):
    model = adapted(kind)
    expected = outputs(base(kind), kind)
    with model.disable_adapter():
        assert torch.equal(outputs(model, kind), expected)
    assert torch.equal(outputs(model.unload(), kind), expected)


@each_kind
def test_every_trained_weight_gets_a_gradient_and_nothing_else(kind):
    model = get_peft_model(base(kind), config(kind)).train()
    perturb(model)
    model(inputs(kind), torch.tensor(0)).square().sum().backward()
    for name, parameter in model.named_parameters():
        trained = any(part in name for part in ("lora_A.", "lora_B.", "lora_lambda."))
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


@each_kind
def test_two_adapters_add_up_switch_and_go(kind):
    model = adapted(kind)
    one = outputs(model, kind)
    model.add_adapter("other", config(kind, r=8, init_lora_weights=False, rank_schedule="cosine"))
    assert torch.equal(outputs(model, kind), one)
    model.set_adapter("other")
    other = outputs(model, kind)
    assert not torch.allclose(other, one)
    model.base_model.set_adapter(["default", "other"])
    both = outputs(model, kind)
    if "attention" not in kind:  # which isn't linear in its updates
        torch.testing.assert_close(
            both - one, other - outputs(base(kind), kind), atol=1e-4, rtol=1e-4
        )
    assert not torch.allclose(both, other)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(outputs(model, kind), one)
    assert not [name for name in model.state_dict() if ".other" in name]


@each_kind
def test_copies_and_pickles_act_alone(kind):
    model = adapted(kind)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = outputs(model, kind)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(outputs(twin, kind), expected)
        perturb(twin, seed=7)
        assert not torch.allclose(outputs(twin, kind), expected)
    assert torch.equal(outputs(model, kind), expected)


@each_kind
def test_plain_lora_beside_it_computes_what_it_did(kind):
    """In either order, and of the attention with PEFT's own factor of the output projection."""
    plain = LoraConfig(r=4, target_modules=targets(kind), init_lora_weights=False)
    alone = inject_adapter_in_model(plain, base(kind), adapter_name="plain").eval()
    weights = get_peft_model_state_dict(alone, adapter_name="plain")
    expected = outputs(alone, kind)
    configs = {"plain": plain, "masked": config(kind)}
    for order in (("plain", "masked"), ("masked", "plain")):
        model = base(kind)
        for name in order:
            inject_adapter_in_model(configs[name], model, adapter_name=name)
        set_peft_model_state_dict(model, weights, adapter_name="plain")
        for layer in model.modules():
            if hasattr(layer, "set_adapter"):
                layer.set_adapter("plain")
        torch.testing.assert_close(outputs(model.eval(), kind), expected, atol=1e-5, rtol=1e-5)


@each_kind
def test_the_status_knows_the_adapter(kind):
    model = adapted(kind)
    status = get_model_status(model)
    assert status.peft_types == {"default": "TLORA"}
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert status.devices == {"default": ["cpu"]}
    assert all(layer.requires_grad == {"default": True} for layer in get_layer_status(model))


@each_kind
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_the_adapter_of_a_bf16_base_is_fp32_if_asked(kind, autocast_adapter_dtype):
    model = get_peft_model(
        base(kind).bfloat16(), config(kind), autocast_adapter_dtype=autocast_adapter_dtype
    )
    perturb(model)
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    state = get_peft_model_state_dict(model)
    floats = {weight.dtype for name, weight in state.items() if "lora_schedule" not in name}
    assert floats == {wanted}
    output = model(inputs(kind).bfloat16(), torch.tensor(300))
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_leaves_every_bit_of_a_low_precision_base(batch_first):
    """PEFT's own layer adds the update and takes it out again, and rounds each time."""
    kind = "attention" if batch_first else "attention, sequence first"
    model = get_peft_model(base(kind).bfloat16(), config(kind)).train()
    perturb(model)
    before = {n: w.clone() for n, w in model.state_dict().items() if "lora_" not in n}
    for t in TIMES:
        model(inputs(kind).bfloat16(), torch.tensor(t)).float().sum().backward()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_attention_wants_one_timestep_for_the_batch():
    model = adapted("attention")
    same = model(inputs("attention"), torch.tensor([700, 700]))
    torch.testing.assert_close(same, outputs(model, "attention", [700])[0])
    with pytest.raises(ValueError, match=r"attention needs one timestep for the whole batch"):
        model(inputs("attention"), torch.tensor([700, 300]))
