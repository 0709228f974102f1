"""Runs a banded export in ComfyUI's own code and compares its weights with the mask at each step.

    python tests/references/comfyui_bands.py COMFYUI

The argument is a checkout of ComfyUI (commit a125cd84) with its dependencies. On tiny random models
of its Stable Diffusion and SD3 classes, workflow.json is validated and its nodes are executed, and
ComfyUI's sampler runs with the hooks; prints the largest error of the update over all steps.
"""

import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from program_names import SD, SD3

from peft_tlora.formats.adapter import Adapter, AdapterLayer
from peft_tlora.formats.bands import write_bands
from peft_tlora.functional import Factors
from peft_tlora.schedule import RankSchedule

R = 16
SIZES = {
    "sd": {"model_channels": 32, "context_dim": 24},
    "sd3": {
        "adm_in_channels": 16,
        "out_channels": 16,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 24, "out_features": 128},
        },
    },
}


def model_of(family):
    import comfy.model_base as bases
    import comfy.supported_models as supported

    torch.manual_seed(0)
    if family == "sd":
        model = bases.BaseModel(supported.SD15(SD | SIZES["sd"]))
    else:
        model = bases.SD3(supported.SD3(SD3 | SIZES["sd3"]))
    for parameter in model.float().eval().parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def adapter_of(family, model):
    """An adapter of random factors for its attention, and the weight and rows of each layer."""
    import comfy.utils

    if family == "sd":
        known = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    else:
        known = comfy.utils.mmdit_to_diffusers(model.model_config.unet_config)
    layers, places = {}, {}
    weights = model.state_dict()
    for name, place in known.items():
        weight, rows = place if isinstance(place, tuple) and len(place) == 2 else (place, None)
        if ".attn" not in name or not name.endswith((".to_q.weight", ".to_v.weight")):
            continue
        key = f"diffusion_model.{weight}"
        if key not in weights:
            continue
        first, size = (0, len(weights[key])) if rows is None else rows[1:]
        shapes = ((R, weights[key].shape[1]), (size, R), (R, 1)) * 2
        factors = Factors(*(0.1 * torch.randn(shape) for shape in shapes))
        layer = name.removesuffix(".weight")
        layers[layer] = AdapterLayer(factors, RankSchedule(R, R // 2), float(R))
        places[layer] = key, slice(first, first + size)
    return Adapter("unet" if family == "sd" else "transformer", layers), places


def conditioning_of(workflow, folder):
    """What the nodes of the workflow make of a random conditioning."""
    import comfy_extras.nodes_hooks
    import execution
    import folder_paths
    import nodes

    folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
    folder_paths.filename_list_cache.clear()
    last = str(len(workflow))
    text = [[torch.randn(1, 5, 24), {"pooled_output": torch.randn(1, 16)}]]

    class Text:
        RETURN_TYPES, FUNCTION = ("CONDITIONING",), "run"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def run(self):
            return (text,)

    class End(Text):
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"a": ("CONDITIONING",), "b": ("CONDITIONING",)}}

    nodes.NODE_CLASS_MAPPINGS |= comfy_extras.nodes_hooks.NODE_CLASS_MAPPINGS
    nodes.NODE_CLASS_MAPPINGS |= {"Text": Text, "End": End}
    ends = {"class_type": "End", "inputs": {"a": [last, 0], "b": [last, 1]}}
    text_node = {"class_type": "Text", "inputs": {}}
    prompt = workflow | {"POSITIVE": text_node, "NEGATIVE": text_node, "END": ends}
    valid = asyncio.run(execution.validate_prompt("", prompt, None))
    if not valid[0]:
        raise ValueError(valid)

    def run(name):
        inputs = prompt[name]["inputs"].items()
        values = {key: run(v[0])[v[1]] if isinstance(v, list) else v for key, v in inputs}
        node = nodes.NODE_CLASS_MAPPINGS[prompt[name]["class_type"]]()
        return getattr(node, node.FUNCTION)(**values)

    return run(last)


def largest_error(family, steps, scheduler):
    """Over all steps and layers, relative to the update; but for timestep 0."""
    import comfy.model_patcher
    import comfy.sample

    model = model_of(family)
    adapter, places = adapter_of(family, model)
    sampling = model.model_sampling
    with tempfile.TemporaryDirectory() as folder:
        shift = sampling.shift if family == "sd3" else None
        write_bands(adapter, folder, count=R // 2, family=family, shift=shift)
        workflow = json.loads((Path(folder) / "workflow.json").read_text())
        positive, negative = conditioning_of(workflow, folder)
    base = {key: weight.clone() for key, weight in model.state_dict().items()}
    errors = []

    def watch(apply, given):
        t = float(sampling.timestep(given["timestep"][:1]))
        now = model.state_dict()
        for name, (key, rows) in places.items() if t else ():
            layer = adapter.layers[name]
            expected = layer.delta(layer.schedule.active_rank(round(t, 3)))
            found = (now[key] - base[key])[rows]
            errors.append(float((found - expected).norm() / expected.norm()))
        return apply(given["input"], given["timestep"], **given["c"])

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    patcher.model_options["model_function_wrapper"] = watch
    latents = torch.zeros(1, 4 if family == "sd" else 16, 8, 8)
    comfy.sample.sample(
        patcher,
        torch.randn_like(latents),
        steps,
        4.0,
        "euler",
        scheduler,
        positive,
        negative,
        latents,
        disable_pbar=True,
        seed=0,
    )
    return max(errors)


def main(comfyui):
    sys.argv = sys.argv[:1]  # ComfyUI parses it
    sys.path.insert(0, comfyui)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    for family in SIZES:
        for steps, scheduler in ((25, "simple"), (25, "normal"), (6, "simple"), (10, "beta")):
            print(family, steps, scheduler, f"{largest_error(family, steps, scheduler):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
