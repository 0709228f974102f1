"""Trainers and loaders of others: where they tell the time, and what they can't read.

Each entry is of code that was read and, where docs/hosts.md says so, run. It takes effect when the
module is imported, before or after `import peft_tlora`. Entries of classes are in `DENOISERS`.
"""

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..integrations.imports import wrap_function
from ..timestep.denoisers import GENERIC_ARGUMENTS
from ..timestep.functions import timestep_from
from ..timestep.state import states_of, timestep_context

# functions that run a denoiser's blocks: "module:function" -> arguments of `timestep_from`
FUNCTIONS: dict[str, dict[str, Any]] = {
    # generation, where training calls the model
    "acestep.models.ace_step_transformer:ACEStepTransformer2DModel.decode": {
        "argument": "timestep",
        "model": "self",
    },
    "OmniGen.model:OmniGen.forward": {"argument": "timestep", "model": "self"},
    "diffsynth.pipelines.*:model_fn_*": {"argument": "timestep", "num_train_timesteps": 1000.0},
    # the timesteps of text, picture and conditions (0); the picture is what is denoised
    "omini.pipeline.flux_omini:transformer_forward": {
        "argument": "timesteps[1]",
        "num_train_timesteps": 1.0,
    },
}
# loaders that know lora_A and lora_B only, and would fuse the differences as if they were LoRA
PLAIN_LOADERS = (
    "diffsynth.utils.lora.*:*Loader.convert_state_dict",
    "diffsynth.utils.lora.*:*Loader.fuse_lora_to_base_model",
    "ltx_core.loader.fuse_loras:apply_loras",
    "videox_fun.utils.lora_utils:merge_lora",
)
# diffusion-pipe cuts a denoiser into layers that hand a tuple on, whose first has the timestep;
# by the module of the model, as most count from 0 to 1
PIPELINE = "models.base:BasePipeline.configure_adapter"
_PIPELINE_UNITS = {
    "models.cosmos": None,  # 0.25 ln(sigma) of its own
    **dict.fromkeys(("models.lumina_2", "models.omnigen2"), (1.0, True)),
    **dict.fromkeys(
        (
            *("models.hidream", "models.hunyuan_image", "models.hunyuan_video", "models.sdxl"),
            *("models.hunyuan_video_15", "models.sd3", "models.wan.wan"),
        ),
        (1000.0, False),
    ),
}


def install() -> None:
    """Let all entries take effect."""
    for place, options in FUNCTIONS.items():
        wrap_function(place, _decorated_if_timed(options))
    for place in PLAIN_LOADERS:
        wrap_function(place, _refusing)
    wrap_function(PIPELINE, _staged)


def _decorated_if_timed(options: dict[str, Any]) -> Callable[[Any], Any]:
    """`timestep_from`, for those of the functions of a pattern that have the argument."""

    def wrap(function: Any) -> Any:
        name = options["argument"].partition("[")[0]
        timed = name in inspect.signature(function).parameters
        return timestep_from(**options)(function) if timed else function

    return wrap


def _refusing(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if any(_has_lambda(value) for value in (*args, *kwargs.values())):
            raise ValueError(
                f"{load.__module__} knows plain LoRA only, and these weights are of a T-LoRA "
                "adapter, whose lora_A and lora_B are differences from its start. Make plain LoRA "
                "of the file, at one mask, with `peft-tlora convert FILE NEW --to lora` (the "
                "trained tensors alone need --config, too), or load it with its masks by "
                "peft_tlora.load_tlora_weights(model, FILE)."
            )
        return load(*args, **kwargs)

    return wrapper


def _has_lambda(value: Any, depth: int = 4) -> bool:
    """Whether there is a T-LoRA's trained tensor in a state dict, a file, or what wraps either."""
    if isinstance(value, Mapping):
        return any("lora_lambda" in str(key) for key in value)
    if isinstance(value, (str, os.PathLike)) and str(value).endswith(".safetensors"):
        if not os.path.isfile(value):
            return False
        with safe_open(value, framework="pt") as file:
            return _has_lambda(dict.fromkeys(file.keys()))
    if depth == 0 or isinstance(value, (str, bytes, Tensor, nn.Module)):
        return False
    if isinstance(value, Sequence):
        return any(_has_lambda(item, depth - 1) for item in value)
    inner = (getattr(value, name, None) for name in ("sd", "state_dict"))
    return any(_has_lambda(item, depth - 1) for item in inner if not callable(item))


def _staged(configure: Callable[..., Any]) -> Callable[..., Any]:
    """Let the layers of a pipeline whose adapter is T-LoRA pass the timestep on."""

    @functools.wraps(configure)
    def configure_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = configure(self, *args, **kwargs)
        model = getattr(self, "transformer", None) or getattr(self, "diffusion_model", None)
        if isinstance(model, nn.Module) and states_of(model):
            to_layers = self.to_layers
            self.to_layers = lambda: _with_timestep(to_layers(), model)
        return result

    return configure_adapter


def _with_timestep(layers: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Layers that hand the timestep on as the last element of their tuple.

    Its bits are passed, as whole numbers, for which a pipeline engine expects no gradient.
    """
    first = next(i for i, layer in enumerate(layers) if _place_of_timestep(layer) is not None)
    place = _place_of_timestep(layers[first])
    unit = _PIPELINE_UNITS.get(type(layers[first]).__module__, (1.0, False))
    if unit is None:
        raise ValueError(
            f"T-LoRA doesn't know how the timesteps of {type(layers[first]).__module__} count; "
            "train it with plain LoRA."
        )
    for i, layer in enumerate(layers[first:]):
        layer.forward = _stage(layer.forward, model, unit, place if i == 0 else None)
        if i == len(layers) - first - 1:
            layer.forward = functools.partial(_without_timestep, layer.forward)
    return layers


def _stage(
    forward: Callable[..., Any], model: nn.Module, unit: tuple[float, bool], place: int | None
) -> Callable[..., Any]:
    total, is_reversed = unit

    @functools.wraps(forward)
    def stage(inputs: Any) -> tuple:
        if place is None:
            *inputs, bits = inputs
            timestep = bits.view(torch.float32)
        else:
            timestep = inputs[place].detach().float()
            bits = timestep.view(torch.int32)
        with timestep_context(
            model, timestep, num_train_timesteps=total, timestep_reversed=is_reversed
        ):
            output = forward(tuple(inputs))
        return (*(output if isinstance(output, tuple) else (output,)), bits)

    return stage


def _without_timestep(forward: Callable[..., Any], inputs: tuple) -> Any:
    *output, _ = forward(inputs)
    return output[0] if len(output) == 1 else tuple(output)


def _place_of_timestep(layer: nn.Module) -> int | None:
    """Where the timestep is in the tuple that a layer takes apart, by the names it gives."""
    function = inspect.unwrap(type(layer).forward)
    argument = list(inspect.signature(function).parameters)[1]
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        unpacks = (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Name)
            and node.value.id == argument
            and isinstance(node.targets[0], ast.Tuple)
        )
        if unpacks:
            names = [getattr(element, "id", None) for element in node.targets[0].elts]  # pyright: ignore[reportAttributeAccessIssue]
            return next((i for i, name in enumerate(names) if name in GENERIC_ARGUMENTS), None)
    return None
