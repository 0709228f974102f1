"""The command `peft-tlora`, also `python -m peft_tlora`."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands import convert, inspect, run, schedule

_COMMANDS = {"inspect": inspect, "convert": convert, "schedule": schedule, "run": run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 for a file or a script that is not what it should be or can't be read or
        written, and argparse's 2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(
        prog="peft-tlora",
        description="T-LoRA for PEFT and diffusers: LoRA whose rank follows the timestep.",
    )
    parser.add_argument("--version", action="version", version=f"peft_tlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, command in _COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.HELP)
        command.add(parsers[name])
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers[args.command].error(f"unknown: {' '.join(unknown)}")
    command = vars(args).pop("command")
    try:
        return _COMMANDS[command].call(parsers[command], args)
    except (OSError, ValueError) as error:
        if command == "run":  # the script's own
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
