"""The command line, `python -m peft_tlora`: parsing and printing."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import TLoraConfig
from .launcher import NoAdapterError, run_script
from .orthogonal import ORTHO_INITS, ORTHO_SOURCES
from .schedule import RANK_SCHEDULES, TIMESTEP_TYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m peft_tlora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run an unedited LoRA script with T-LoRA")
    _add_run(run)
    args = vars(parser.parse_args(arguments))
    del args["command"]
    script, rest = args.pop("script"), args.pop("arguments")
    text_encoders = args.pop("text_encoders", False)
    if not Path(script).is_file():
        run.error(f"no such script: {script}")
    try:
        TLoraConfig(**args)
    except (TypeError, ValueError) as error:
        run.error(str(error))
    try:
        run_script(script, rest, text_encoders=text_encoders, **args)
    except NoAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a LoRA training script with T-LoRA in the place of LoRA."
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--min-rank", type=_rank, help="an int is a rank, a float a fraction of r")
    add("--rank-schedule", choices=RANK_SCHEDULES)
    add("--schedule-exponent", type=float)
    add(
        "--ortho-init",
        type=_optional,
        choices=[*ORTHO_INITS, None],
        metavar="|".join(ORTHO_INITS) + "|none",
    )
    add("--ortho-source", choices=ORTHO_SOURCES)
    add("--num-train-timesteps", type=float)
    add("--timestep-reversed", action=argparse.BooleanOptionalAction)
    add("--timestep-type", choices=TIMESTEP_TYPES)
    add("--init-seed", type=int)
    add("--text-encoders", action="store_true", help="models without a timestep, too")
    add("script", help="path of the script")
    add("arguments", nargs=argparse.REMAINDER, help="its own arguments, untouched")


def _rank(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _optional(text: str) -> str | None:
    return None if text == "none" else text
