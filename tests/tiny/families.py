"""One small model of each family of base models that formats name, and adapters for them."""

import copy
import functools
import json
from pathlib import Path

import diffusers
import torch
from peft import inject_adapter_in_model

from peft_tlora import TLoraConfig
from peft_tlora.formats.adapter import Adapter, AdapterLayer

from ..conftest import perturb
from . import image, video_audio

MIDDLE = {"flux": 0.5}  # a timestep in the model's unit with some of the ranks active
# layers' names and shapes in other programs
REFERENCE = Path(__file__).parents[1] / "references" / "program_names.json"
PROGRAMS = json.loads(REFERENCE.read_text())


def sd():
    return _unet(768, ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"))


def sdxl():
    return _unet(
        2048,
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24,
    )


def _unet(width, down, up, **kwargs):
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, **kwargs}
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=4,
        down_block_types=down,
        up_block_types=up,
        **sizes,
    )


_ATTENTION = r".*\.attn.*\.(to_q|to_k|to_v|to_out\.0)"
_ADAPTERS = {}  # by how they were made; nobody changes them
# family -> model, layers
FAMILIES = {
    "sd": (sd, rf"{_ATTENTION}|.*\.(conv1|conv_shortcut|proj_in|time_emb_proj|net\.2)"),
    "sdxl": (
        sdxl,  # many layers: not all kinds of each block
        r".*\.(attn1\.(to_q|to_out\.0)|attn2\.(to_k|to_v)|conv2|proj_out|time_emb_proj)"
        r"|.*\.(conv_shortcut|downsamplers\.0\.conv)",
    ),
    "sd3": (image.sd3, rf"{_ATTENTION}|.*\.(add_._proj|ff\.net\.0\.proj|ff_context\.net\.2)"),
    "flux": (
        image.flux,
        r".*\.attn\.(to_[qkv]|to_out\.0|to_add_out|add_._proj)|.*\.(proj_mlp|norm1\.linear)",
    ),
    "wan": (video_audio.wan, rf"{_ATTENTION}|.*\.ffn\.net\.(0\.proj|2)"),
}


def model(family, seed=0):
    return copy.deepcopy(_model(family, seed))


@functools.cache
def _model(family, seed):
    torch.manual_seed(seed)
    return FAMILIES[family][0]().eval().requires_grad_(False)


def adapted(family, layers=None, **fields):
    """A model with a trained adapter named "toy"."""
    fields = {"r": 6, "min_rank": 2, "lora_alpha": 3, "init_seed": 0, **fields}
    base = model(family)
    config = TLoraConfig(target_modules=layers or FAMILIES[family][1], **fields)
    inject_adapter_in_model(config, base, adapter_name="toy")
    perturb(base, scale=0.1)
    return base


def adapter_of(base):
    """The adapter of a model, taken from its layers one by one."""
    layers = {}
    for name, module in base.named_modules():
        variant = getattr(module, "lora_variant", {}).get("toy")
        if variant is not None:
            factors = type(variant.factors(module, "toy"))(
                *(None if f is None else f.detach().clone() for f in variant.factors(module, "toy"))
            )
            in_file = "lora_A_init.toy.weight" in module.state_dict()
            layers[name] = AdapterLayer(
                factors,
                variant.ranks.schedule,
                module.lora_alpha["toy"],
                module.use_rslora["toy"],
                recipe=None if in_file else module.recipes.get("toy"),
            )
    return Adapter(
        "unet" if isinstance(base, diffusers.UNet2DConditionModel) else "transformer", layers
    )


def adapter(family, layers=None, **fields):
    key = (family, repr(layers), repr(sorted(fields.items())))
    if key not in _ADAPTERS:
        _ADAPTERS[key] = adapter_of(adapted(family, layers, **fields))
    return _ADAPTERS[key]


def assert_equal(found, expected):
    """Check that two adapters have the same bits."""
    assert found.component == expected.component
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert other.schedule == layer.schedule, name
        assert other.scaling == layer.scaling, name
        assert other.recipe == layer.recipe, name
        for a, b in zip(other.factors, layer.factors, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


def expected_deltas(adapter, t):
    """The paper's formula with float64 factors."""
    deltas = {}
    for name, layer in adapter.layers.items():
        dq, dp, *rest = (f.double() for f in layer.factors if f is not None)
        mask = (torch.arange(len(dq)) < layer.schedule.active_rank(t)).double()
        delta = dp.flatten(1) @ torch.diag(mask) @ dq.flatten(1)
        if rest:
            dlam, q0, p0, lam0 = rest
            delta = _masked(q0 + dq, p0 + dp, lam0 + dlam, mask) - _masked(q0, p0, lam0, mask)
        deltas[name] = (layer.lora_alpha / len(dq) * delta).reshape(len(dp), *dq.shape[1:])
    return deltas


def _masked(q, p, lam, mask):
    return p.flatten(1) @ torch.diag(mask * lam.flatten()) @ q.flatten(1)
