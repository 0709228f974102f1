"""Writes the reference for the names of other programs: which of them their own loaders take.

    python tests/references/program_names.py COMFYUI SD_SCRIPTS MUSUBI_TUNER

The arguments are checkouts of ComfyUI (pinned: commit a125cd84), kohya's sd-scripts (48d368fa) and
musubi-tuner (30c658c4), which need their own dependencies. Each program builds the original model,
shallow and without weights. Of ComfyUI the reference holds every name that `model_lora_keys_unet`
knows with the prefixes that are written for it, and the weight (and rows of it) that the name
means. Of the trainers it holds the names for which their network, made of a file that has one for
every layer of the model, has a LoRA (of SDXL's ten equal blocks the first two).
"""

import json
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 320,
    "num_classes": None,
    "adm_in_channels": None,
}
SD = UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_linear_in_transformer": False,
}
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 2, 2],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": 2048,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
SD3 = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 2,
    "adm_in_channels": 2048,
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0, 1],
}
FLUX = {
    "in_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
WAN = {"model_type": "i2v", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 2}
PREFIXES = {"sd": "lora_unet_", "sdxl": "lora_unet_", "sd3": "transformer.", "flux": "transformer."}
PREFIXES["wan"] = "diffusion_model."


def comfyui_models():
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_base as bases
    import comfy.supported_models as supported

    context = {"in_features": 4096, "out_features": 128}
    sd3 = SD3 | {
        "out_channels": 16,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": context},
    }
    flux = FLUX | {"image_model": "flux", "patch_size": 2, "out_channels": 16}
    return {
        "sd": bases.BaseModel(supported.SD15(SD), device="meta"),
        "sdxl": bases.SDXL(supported.SDXL(SDXL), device="meta"),
        "sd3": bases.SD3(supported.SD3(sd3), device="meta"),
        "flux": bases.Flux(supported.Flux(flux), device="meta"),
        "wan": bases.WAN21(
            supported.WAN21_I2V(WAN | {"image_model": "wan2.1", "in_dim": 36}),
            image_to_video=True,
            device="meta",
        ),
    }


def comfyui_names(family, model):
    """Without the names that are the weight's own with underscores."""
    import comfy.lora

    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    names = {}
    for name, weight in comfy.lora.model_lora_keys_unet(model, {}).items():
        weight, rows = weight[:2] if isinstance(weight, tuple) else (weight, None)
        original = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        if (
            name.startswith(PREFIXES[family])
            and name != f"lora_unet_{original}".replace(".", "_")
            and len(shapes.get(weight, ())) > 1
        ):
            names[name] = [original, None if rows is None else [rows[1], rows[1] + rows[2]]]
    return names


def trainer_models():
    from library.flux_models import Flux, FluxParams
    from library.original_unet import UNet2DConditionModel
    from library.sd3_models import MMDiT
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    torch.cuda.current_device = lambda: 0  # musubi-tuner asks for it when it is imported
    from musubi_tuner.wan.modules.model import WanModel

    sd3 = SD3 | {"context_embedder_in_features": 4096, "context_embedder_out_features": 128}
    sd3["input_size"] = 8
    with torch.device("meta"):
        return {
            "sd": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            "sdxl": SdxlUNet2DConditionModel(),
            "sd3": MMDiT(**sd3),
            "flux": Flux(FluxParams(**FLUX | {"in_channels": 64})),
            "wan": WanModel(**WAN, in_dim=36),
        }


def trainer_names(family, model):
    import networks.lora
    import networks.lora_flux
    import networks.lora_sd3
    from musubi_tuner.networks import lora_wan

    one = torch.ones(1, 1)
    file = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            key = f"lora_unet_{name}".replace(".", "_")
            file |= {f"{key}.lora_down.weight": one, f"{key}.lora_up.weight": one}
            file[f"{key}.alpha"] = torch.tensor(1.0)
    if family == "wan":
        network = lora_wan.create_arch_network_from_weights(1.0, file, None, model)
    else:
        module = {"sd3": networks.lora_sd3, "flux": networks.lora_flux}.get(family, networks.lora)
        network, _ = module.create_network_from_weights(1.0, "", None, [], model, file)
    names = (lora.lora_name for lora in network.unet_loras)
    return sorted(name for name in names if not re.search(r"transformer_blocks_[2-9]", name))


def main(comfyui, sd_scripts, musubi):
    sys.argv = sys.argv[:1]  # ComfyUI parses it
    sys.path[:0] = [comfyui, sd_scripts, f"{musubi}/src"]
    comfyui_of, trainer_of = comfyui_models(), trainer_models()
    content = {
        family: {
            "comfyui": comfyui_names(family, comfyui_of[family]),
            "trainer": trainer_names(family, trainer_of[family]),
        }
        for family in PREFIXES
    }
    text = json.dumps(content, separators=(",", ":")).replace('],"', '],\n"')
    (HERE / "program_names.json").write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
