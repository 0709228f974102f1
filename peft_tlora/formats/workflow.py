"""A fragment of a ComfyUI workflow that switches LoRAs over time with hook keyframes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# a step whose sigma is an edge, but for its rounding to float32, belongs to the band that begins
_ROUNDING = 1e-5


def workflow(bands: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The nodes, in ComfyUI's API format, that activate each LoRA in its range of percents.

    Each LoRA has a hook of its own with keyframes: off, on at the start of its band, off at its
    end. The last node puts the hooks on the conditioning: connect positive_NEW and negative_NEW to
    the workflow's text encodings, and its outputs to the sampler.

    Args:
        bands: Entries of bands.json, with "file" and "percent".
    """
    nodes: dict[str, Any] = {}

    def node(class_type: str, **inputs: Any) -> list[Any]:
        nodes[str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return [str(len(nodes)), 0]

    hooks = None
    for band in bands:
        start, end = (max(0.0, percent - _ROUNDING) for percent in band["percent"])
        keyframes = _switched_on(node, start)
        if band["percent"][1] < 1:
            keyframes = node(
                "CreateHookKeyframe", strength_mult=0.0, start_percent=end, prev_hook_kf=keyframes
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


def _switched_on(node: Callable[..., list[Any]], start: float) -> list[Any]:
    """Keyframes that are off and go on at a percent.

    A keyframe of a node of its own lasts a step at least, also if its band has none, and would then
    act together with the next band's. The second of an interpolation doesn't.
    """
    if start == 0:
        return node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    return node(
        "CreateHookKeyframesInterpolated",
        strength_start=0.0,
        strength_end=1.0,
        interpolation="linear",
        start_percent=0.0,
        end_percent=start,
        keyframes_count=2,
        print_keyframes=False,
    )
