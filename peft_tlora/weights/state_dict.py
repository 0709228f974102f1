"""What the weights alone tell: a configuration from a state dict without config or metadata."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from ..config import TLoraConfig
from ..schedule import SCHEDULE_FIELDS, RankSchedule
from .encoding import Encoded, decode_schedule

SCHEDULE = ".lora_schedule.weight"
_LAMBDA = ".lora_lambda.weight"
# how other programs say that a file is T-LoRA: the names of its tensors, keys of its metadata, and
# what keys that name an algorithm hold
_FOREIGN_TENSOR = re.compile(r"\.(q_layer|p_layer|lambda_layer|base_lambda(_buf)?)(\.|$)")
_FOREIGN_NAME = re.compile(r"t[-_]?lora", re.IGNORECASE)
_ALGORITHMS = ("ss_network_module", "ss_network_args", "network_module", "algo", "network_type")
TRAINED_ALONE = (
    "the trained tensors of a T-LoRA adapter without its lora_schedule, as a host saves them that "
    "keeps what requires grad"
)
Number = TypeVar("Number", int, float)


def is_tlora(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of a T-LoRA adapter."""
    return any(key.endswith(SCHEDULE) for key in state_dict)


def is_half(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether weights are the trained tensors of a T-LoRA adapter without its schedule."""
    return not is_tlora(state_dict) and any(key.endswith(_LAMBDA) for key in state_dict)


def is_foreign(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether names or metadata are those of a T-LoRA adapter that another program has written."""
    if is_tlora(state_dict) or is_half(state_dict):
        return False
    told = {k: metadata[k] for k in _ALGORITHMS if k in metadata}
    return (
        any(_FOREIGN_TENSOR.search(name) for name in state_dict)
        or any(_FOREIGN_NAME.search(name) for name in metadata)
        or any(_FOREIGN_NAME.search(str(value)) for value in told.values())
    )


def config_from_state_dict(state_dict: Mapping[str, Tensor]) -> TLoraConfig:
    """Rebuild the configuration of an adapter from its weights.

    The schedule, min_rank, the timestep range, lora_alpha and use_rslora come from the schedule
    tensors, r and rank_pattern from the shapes, target_modules from the names. Dropout and the like
    are not in the weights and keep their defaults; neither is how the adapter was initialised, if
    the file holds its start.

    Args:
        state_dict: Weights as `peft.get_peft_model_state_dict` returns them or a file holds them.

    Returns:
        A config that rebuilds the adapter's layers with `inject_adapter_in_model`, whose names are
        those of the state dict.

    Raises:
        ValueError: If it holds no T-LoRA adapter, or its layers differ in more than rank and alpha.
    """
    layers = [key.removesuffix(SCHEDULE) for key in state_dict if key.endswith(SCHEDULE)]
    if not layers:
        raise ValueError(
            "The state dict holds no T-LoRA adapter: none of its "
            f"{len(state_dict)} tensors is named '*{SCHEDULE}'."
        )
    ranks = {layer: state_dict[f"{layer}.lora_A.weight"].shape[0] for layer in layers}
    decoded = {
        layer: decode_schedule(state_dict[layer + SCHEDULE], ranks[layer], layer)
        for layer in layers
    }
    alphas = {layer: encoded.lora_alpha for layer, encoded in decoded.items()}
    shared = {
        (*schedule_fields(encoded.schedule).items(), encoded.use_rslora)
        for encoded in decoded.values()
    }
    if len(shared) > 1:
        raise ValueError(
            f"The layers of one adapter must share one schedule, found {len(shared)}: {shared}."
        )
    one = decoded[layers[0]]
    r, rank_pattern = pattern_of(ranks)
    lora_alpha, alpha_pattern = pattern_of(alphas)
    return TLoraConfig(
        r=r,
        rank_pattern=rank_pattern,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]
        alpha_pattern=alpha_pattern,
        use_rslora=one.use_rslora,
        target_modules=layers,
        **schedule_fields(one.schedule),
        **initialisation_fields(state_dict, one),
    )


def schedule_fields(schedule: RankSchedule) -> dict[str, Any]:
    """The fields of a config whose layers of rank `schedule.r` have just this schedule."""
    fields = {name: getattr(schedule, name) for name in SCHEDULE_FIELDS}
    if schedule.timestep_type != "linear":
        del fields["num_train_timesteps"], fields["timestep_reversed"]
    return fields


def initialisation_fields(state_dict: Mapping[str, Tensor], encoded: Encoded) -> dict[str, Any]:
    """The fields of a config that make the start of an adapter with such weights."""
    if not any(key.endswith(_LAMBDA) for key in state_dict):
        return {"ortho_init": None}
    held = any(key.endswith(".lora_lambda_init.weight") for key in state_dict)
    if encoded.recipe is None:  # the file's start takes the place of the one made from the config
        return {"ortho_init": "last", "save_initial_factors": True}
    return {
        "ortho_init": encoded.recipe.choice,
        "init_seed": encoded.recipe.seed,
        "save_initial_factors": held,
    }


def pattern_of(values: dict[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The most common value, and those of the layers that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{layer}": value for layer, value in values.items() if value != common}
