"""A fragment of a ComfyUI workflow that switches LoRAs over time with hook keyframes."""

from collections.abc import Mapping, Sequence
from typing import Any


def workflow(bands: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The nodes, in ComfyUI's API format, that activate each LoRA in its range of percents.

    Each LoRA has a hook of its own with keyframes: off, on at the start of its band, off at its
    end. The last node puts the hooks on the conditioning: connect positive_NEW and negative_NEW to
    the workflow's text encodings, and its outputs to the sampler. A keyframe lasts at least one
    step, so each band needs a step that falls into it.

    Args:
        bands: Entries of bands.json, with "file" and "percent".
    """
    nodes: dict[str, Any] = {}

    def node(class_type: str, **inputs: Any) -> list[Any]:
        nodes[str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return [str(len(nodes)), 0]

    hooks = None
    for band in bands:
        start, end = band["percent"]
        keyframes = None
        for strength, percent in [(0.0, 0.0)] * (start > 0) + [(1.0, start), (0.0, end)]:
            if percent < 1:
                previous = {} if keyframes is None else {"prev_hook_kf": keyframes}
                keyframes = node(
                    "CreateHookKeyframe", strength_mult=strength, start_percent=percent, **previous
                )
        lora = node("CreateHookLoraModelOnly", lora_name=band["file"], strength_model=1.0)
        timed = node("SetHookKeyframes", hooks=lora, hook_kf=keyframes)
        hooks = timed if hooks is None else node("CombineHooks2", hooks_A=hooks, hooks_B=timed)
    node(
        "PairConditioningSetProperties",
        positive_NEW=["POSITIVE", 0],
        negative_NEW=["NEGATIVE", 0],
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    return nodes
