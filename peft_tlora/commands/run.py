"""`peft-tlora run`: an unedited LoRA script with T-LoRA."""

import argparse
import sys
from pathlib import Path

from ..config import TLoraConfig
from ..orthogonal import ORTHO_INITS, ORTHO_SOURCES
from .launcher import NotTrainedError, run_script
from .options import add_direction, add_schedule

HELP = "run an unedited LoRA script with T-LoRA"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = "Run a LoRA training script with T-LoRA in the place of LoRA."
    parser.argument_default = argparse.SUPPRESS
    add_schedule(parser)
    option = parser.add_argument
    option(
        "--ortho-init",
        type=_optional,
        choices=[*ORTHO_INITS, None],
        metavar="|".join(ORTHO_INITS) + "|none",
    )
    option("--ortho-source", choices=ORTHO_SOURCES)
    add_direction(parser)
    option("--init-seed", type=int)
    option("--text-encoders", action="store_true", help="models without a timestep, too")
    option(
        "--timestep-from",
        action="append",
        type=_function,
        metavar="MODULE:FUNCTION:ARGUMENT",
        help="a function of a module that the script imports, and its argument that is the "
        "timestep, where the script runs a model's blocks itself",
    )
    option("script", nargs="?", help="path of the script")
    option("arguments", nargs=argparse.REMAINDER, help="its own arguments, untouched")


def call(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    args = vars(arguments)
    script, rest = args.pop("script", None), args.pop("arguments", [])
    text_encoders = args.pop("text_encoders", False)
    functions = dict(args.pop("timestep_from", ()))
    if script is None:
        parser.error("which script? peft-tlora run [OPTIONS] train_script.py [ITS ARGUMENTS]")
    misplaced = sorted({word.partition("=")[0] for word in rest} & _own_options(parser))
    if misplaced:
        print(
            f"peft_tlora: {', '.join(misplaced)} stands behind the script and goes to it; "
            "T-LoRA's options stand before it.",
            file=sys.stderr,
        )
    if not Path(script).is_file():
        parser.error(f"no such script: {script}")
    try:
        TLoraConfig(**args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        run_script(script, rest, text_encoders=text_encoders, timestep_from=functions, **args)
    except NotTrainedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _own_options(parser: argparse.ArgumentParser) -> set[str]:
    """The options that no script is likely to have."""
    names = {name for action in parser._actions for name in action.option_strings}
    return {name for name in names if name.startswith("--") and name != "--help"}


def _function(text: str) -> tuple[str, str]:
    """The function as "module:function", and the argument."""
    function, _, argument = text.rpartition(":")
    if not argument or not all(function.partition(":")):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of three parts, as in trainer.pipeline:model_forward:timestep"
        )
    return function, argument


def _optional(text: str) -> str | None:
    return None if text == "none" else text
