"""The contact with PEFT's registry: the enum member and the tables of tuners."""

from typing import Any

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

_NAME = "TLORA"
# besides what LoRA's adapters must share: a hotswap exchanges tensors, not the layers' schedules
_EQUAL_FOR_HOTSWAP = [
    "r",
    "rank_pattern",
    "min_rank",
    "rank_schedule",
    "schedule_exponent",
    "rank_multiple",
    "num_train_timesteps",
    "timestep_reversed",
    "timestep_type",
    "ortho_init",
]


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT know T-LoRA. A repeated call, as after a reload, puts the newest classes in.

    PEFT's own `register_peft_method` refuses names outside of its enum and refuses to run twice.
    """
    if _NAME not in PeftType.__members__:
        _add_member(_NAME)
    peft_type = PeftType[_NAME]
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix  # pyright: ignore[reportAttributeAccessIssue]
    CONFIG_KEYS_TO_CHECK[peft_type] = CONFIG_KEYS_TO_CHECK[PeftType.LORA] + _EQUAL_FOR_HOTSWAP


def _add_member(name: str) -> None:
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # before the map knows the name: afterwards the enum refuses to set it
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = member  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
