"""The names of plain LoRA files against what the other programs load.

tests/references/program_names.py made the reference by running ComfyUI's and the trainers' code.
"""

import contextlib

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from peft_tlora.formats.lora import write_lora
from peft_tlora.formats.plain import PlainLora

from .tiny.families import PROGRAMS

UNET = diffusers.UNet2DConditionModel
# as large as the models of the reference
MODELS = {
    "sd": lambda: UNET(cross_attention_dim=768),
    "sdxl": lambda: UNET(
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        caption_projection_dim=128,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, guidance_embeds=True
    ),
    "wan": lambda: diffusers.WanTransformer3DModel(
        num_attention_heads=12,
        num_layers=2,
        ffn_dim=8960,
        in_channels=36,
        image_dim=1280,
        added_kv_proj_dim=1536,
    ),
}
REFUSED_BY_KOHYA = {
    "sd": {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
    "sd3": {"norm_out.linear", *(f"transformer_blocks.{i}.norm1_context.linear" for i in (0, 1))},
    "flux": {"norm_out.linear", "proj_out"},
}
REFUSED_BY_KOHYA["sdxl"] = REFUSED_BY_KOHYA["sd"] | {f"add_embedding.linear_{i}" for i in (1, 2)}


def weights(family):
    """Each layer of a family's model with the shape of its weight."""
    with torch.device("meta"):
        model = MODELS[family]()
    return {
        name: module.weight.shape
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() > 1
    }


def numbered(family):
    """A LoRA of rank 1 for each layer whose update has one value, a number of its own."""
    layers = {}
    for number, (name, shape) in enumerate(weights(family).items(), start=1):
        up = torch.full((shape[0], 1, *(1,) * (len(shape) - 2)), float(number))
        layers[name] = torch.ones(1, *shape[1:]), up
    return layers


def component(family):
    return "unet" if family.startswith("sd") and family != "sd3" else "transformer"


def accepted(layers, names, family, path):
    """The layers that a writer takes; the others it has to refuse by name."""
    found = {}
    for name, pair in layers.items():
        with contextlib.suppress(ValueError):
            write_lora(PlainLora(component(family), {name: pair}), path, names, family=family)
            found[name] = pair
    for name in layers.keys() - found.keys():
        with pytest.raises(ValueError, match=f"Layer {name} has no name in"):
            write_lora(
                PlainLora(component(family), {name: layers[name]}), path, names, family=family
            )
    return found


@pytest.mark.parametrize("family", PROGRAMS)
def test_comfyui_loads_each_key_for_the_layer_that_it_is_of(tmp_path, family):
    path, known = tmp_path / "a.safetensors", PROGRAMS[family]["comfyui"]
    layers = accepted(numbered(family), "comfyui", family, path)
    write_lora(PlainLora(component(family), layers), path, "comfyui", family=family)
    keys = {key.rpartition(".lora_")[0] or key.rpartition(".")[0] for key in load_file(path)}
    assert keys <= known.keys()
    assert len(keys) == len(layers)
    if family != "wan":  # it has the names of the weights, which the next test checks
        assert layers.keys() == weights(family).keys()


@pytest.mark.parametrize("family", PROGRAMS)
def test_the_trainers_load_each_key_and_the_rows_are_where_comfyui_has_them(tmp_path, family):
    path, numbers = tmp_path / "a.safetensors", numbered(family)
    layers = accepted(numbers, "kohya", family, path)
    refused = numbers.keys() - layers.keys()
    assert refused == {n for n in numbers if n in REFUSED_BY_KOHYA.get(family, refused)}
    assert family != "wan" or not any(name.startswith("blocks.") for name in refused)
    write_lora(PlainLora(component(family), layers), path, "kohya", family=family)
    tensors = load_file(path)
    keys = {key.partition(".")[0] for key in tensors}
    assert keys <= set(PROGRAMS[family]["trainer"])
    if family == "wan":
        assert {f"blocks_1_cross_attn_{x}_img" for x in "kv"} <= {k[10:] for k in keys}
    if family in ("sd", "wan"):  # the trainers and ComfyUI have the same names
        return
    prefix = "lora_unet_{}" if family == "sdxl" else "transformer.{}"
    for name, (_, up) in layers.items():
        ours = prefix.format(name.replace(".", "_") if family == "sdxl" else name)
        weight, rows = PROGRAMS[family]["comfyui"][ours]
        key = f"lora_unet_{weight}".replace(".", "_")
        # of the middle entry of a kernel; down is all ones
        found = tensors[f"{key}.lora_up.weight"].flatten(1).sum(1)
        start, end = rows or (0, len(found))
        assert end - start == len(up), name
        assert found[start:end].unique().tolist() == [float(up.flatten()[0])], name
