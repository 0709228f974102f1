"""Options that several commands have, and how they print."""

import argparse
import os
import sys
from typing import Any, TextIO

from ..formats.adapter import Adapter
from ..formats.base import load_base
from ..formats.facts import TrainingFacts
from ..formats.reading import format_of, read_adapter
from ..formats.state_dict import read_config
from ..schedule import RANK_SCHEDULES, TIMESTEP_TYPES
from ..weights.files import AdapterFile

_FACTS = ("min_rank", "rank_schedule", "schedule_exponent", "num_train_timesteps", "sig_type")
_FACTS += ("boundary_timestep",)


def add_schedule(parser: argparse._ActionsContainer) -> None:
    """The fields of a rank schedule."""
    add = parser.add_argument
    add("--min-rank", type=rank, help="an int is a rank, a float a fraction of r")
    add("--rank-schedule", choices=RANK_SCHEDULES)
    add("--schedule-exponent", type=float, help="the paper's alpha")
    add("--num-train-timesteps", type=float, help="the timestep of pure noise, as the model counts")


def add_direction(parser: argparse._ActionsContainer) -> None:
    """How timesteps are counted."""
    parser.add_argument("--timestep-reversed", action=argparse.BooleanOptionalAction)
    parser.add_argument("--timestep-type", choices=TIMESTEP_TYPES)


def add_facts(
    parser: argparse.ArgumentParser, title: str = "what the file may not say about its training"
) -> None:
    """What a file may not say, and the base model that some need."""
    group = parser.add_argument_group(title)
    add_schedule(group)
    group.add_argument("--sig-type", choices=["principal", "last", "middle"])
    group.add_argument("--boundary-timestep", type=int, help="Takenoko's tlora_boundary_timestep")
    group.add_argument("--base", metavar="FOLDER", help="the base model, as diffusers saves it")
    group.add_argument("--hparams", metavar="FILE", help="hparams.yml of the authors' trainers")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="the training's TLoraConfig as JSON: a file, a folder with adapter_config.json or the "
        "text itself, for a file that holds trained tensors alone",
    )
    parser.add_argument("--component", help="which model of the pipeline, such as unet")
    parser.add_argument("--allow-pickle", action="store_true", help="read .pt files, too")


def given_of(args: argparse.Namespace, *, weights: bool) -> dict[str, Any]:
    """What the options of `add_facts` say, as arguments of `read_adapter`."""
    facts = {name: getattr(args, name) for name in _FACTS}
    return {
        "facts": TrainingFacts(**facts),
        "base": None if args.base is None else load_base(args.base, weights=weights),
        "component": args.component,
        "hparams": args.hparams,
        "config": None if args.config is None else read_config(args.config),
    }


def adapter_of(file: AdapterFile, args: argparse.Namespace) -> Adapter:
    """The adapter in a file, with the options of `add_facts`."""
    weights = args.base is not None and format_of(file) == "lycoris"
    return read_adapter(file, **given_of(args, weights=weights))


def rank(text: str) -> int | float:
    """A rank or a fraction of it."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a rank such as 8 nor a fraction of r such as 0.5"
        ) from None


def bold(text: Any, stream: TextIO | None = None) -> str:
    """A text in bold where a terminal shows it."""
    shown = (stream or sys.stdout).isatty() and "NO_COLOR" not in os.environ
    return f"\033[1m{text}\033[0m" if shown else str(text)


def warn(text: str) -> None:
    """A warning on standard error."""
    print(f"{bold('warning:', sys.stderr)} {text}", file=sys.stderr)
