"""The contact with PEFT: its registry, its versions, and an optimizer that can't take T-LoRA."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from packaging.version import Version
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

_TESTED = ("0.21", "0.22")  # from, and below
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
    "save_initial_factors",
    "init_seed",  # files without frozen factors exchange the trained ones only
]
_REFUSES = "_refuses_tlora"


def install(config_cls: type, model_cls: type) -> None:
    """Make PEFT know T-LoRA, and warn of a version that nobody has tested."""
    register(config_cls, model_cls)
    _refuse_lorafa()
    first, end = map(Version, _TESTED)
    if not first <= Version(peft.__version__) < end:
        warnings.warn(
            f"peft_tlora is tested with PEFT from {first} to below {end}, but {peft.__version__} "
            "is installed: a part of PEFT that it relies on may have changed.",
            stacklevel=3,
        )


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


@contextmanager
def lora_tuner(tuner: type) -> Iterator[None]:
    """Let PEFT make another tuner wherever it would make LoRA's, for the time of the context."""
    previous = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = tuner
    try:
        yield
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = previous


def _refuse_lorafa() -> None:
    """Let PEFT's LoRA-FA optimizer refuse T-LoRA, where it would take lora_lambda for a lora_A."""
    original = LoraFAOptimizer.step
    if hasattr(original, _REFUSES):
        return

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for group in self.param_groups for name in group.get("names", ())]
        if any("lora_lambda" in name for name in names):
            raise ValueError(
                "The LoRA-FA optimizer is not supported with T-LoRA: it freezes lora_A and inverts "
                "A A^T, and a T-LoRA layer trains three factors whose lora_A starts at zero. Use "
                "another optimizer, such as AdamW or LoRA+."
            )
        return original(self, *args, **kwargs)

    setattr(step, _REFUSES, True)
    LoraFAOptimizer.step = step
