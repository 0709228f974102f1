"""The command `peft-tlora`, also `python -m peft_tlora`."""

import argparse
import sys
from collections.abc import Sequence

from .commands import convert, inspect, run, schedule

_COMMANDS = {"inspect": inspect, "convert": convert, "schedule": schedule, "run": run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 for a file or a script that is not what it should be, and argparse's
        2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(
        prog="peft-tlora",
        description="T-LoRA for PEFT and diffusers: LoRA whose rank follows the timestep.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, command in _COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.HELP)
        command.add(parsers[name])
    args = parser.parse_args(arguments)
    command = vars(args).pop("command")
    try:
        return _COMMANDS[command].call(parsers[command], args)
    except ValueError as error:
        if command == "run":  # the script's own
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
