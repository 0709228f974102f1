"""`peft-tlora schedule`: the active rank over time."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ..schedule import SCHEDULE_FIELDS, RankSchedule
from ..weights.files import open_file
from .options import adapter_of, add_direction, add_facts, bold
from .steps import load_scheduler, plot, steps_of, transitions

HELP = "show the active rank over timesteps or a scheduler's steps"
# what every file with a schedule says, and what is of files alone
_NEVER_MISSING = {"r", "timestep_reversed", "timestep_type", "rank_multiple"}
_OF_ADAPTERS = ("sig_type", "boundary_timestep", "base", "hparams", "config", "component")
_OF_ADAPTERS += ("allow_pickle",)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Show where ranks switch on, or the active rank at each step of a scheduler of diffusers, "
        "of a schedule given by its fields or by an adapter."
    )
    option = parser.add_argument
    option("--adapter", metavar="FILE", help="take the schedule of this adapter")
    option("--rank", type=int, help="of the layer; default 16")
    add_direction(parser)
    option("--rank-multiple", type=int, help="ranks that switch on together")
    option("--scheduler", help="a class of diffusers, or the folder of a pipeline")
    option("--steps", type=int, help="of the scheduler; default 25")
    option("--shift", type=float, help="of a flow-matching scheduler")
    option("--plot", metavar="FILE.png", help="draw it, too")
    option("--json", action="store_true", help="for a program")
    add_facts(parser, "the schedule, or what the adapter's file may not say about it")


def call(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.scheduler is None and (args.steps is not None or args.shift is not None):
        parser.error("--steps and --shift need a --scheduler")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    schedule = _schedule(parser, args)
    steps = None
    if args.scheduler is not None:
        steps = steps_of(schedule, load_scheduler(args.scheduler, args.shift), args.steps or 25)
    if args.plot is not None:
        plot(args.plot, schedule, steps)
        print(f"wrote {args.plot}", file=sys.stderr)
    shown = steps if steps is not None else transitions(schedule)
    if args.json:
        fields = {**asdict(schedule), "r_min": schedule.r_min}
        entries = [asdict(step) for step in shown]
        print(json.dumps({"schedule": fields, "steps" if steps else "changes": entries}))
        return 0
    print(f"{bold('rank')} {schedule.r_min} to {schedule.r} of {schedule}")
    print(f"{'step' if steps else '':>5} {'timestep':>10} {'noise':>6} {'rank':>5}")
    for i, step in enumerate(shown):
        number = i if steps else "from"
        bar = "#" * round(20 * step.rank / schedule.r)
        print(f"{number:>5} {step.timestep:>10.4g} {step.noise:>6.3f} {step.rank:>5} {bar}")
    if steps:
        mean = sum(step.rank for step in steps) / len(steps)
        print(f"mean rank {mean:.2f} of {schedule.r}")
    return 0


def _schedule(parser: argparse.ArgumentParser, args: argparse.Namespace) -> RankSchedule:
    options = {"r": args.rank, **{name: getattr(args, name, None) for name in SCHEDULE_FIELDS}}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if args.adapter is not None:
        if given.keys() & _NEVER_MISSING:
            parser.error("--adapter has a schedule: leave the other fields out")
        file = open_file(args.adapter, allow_pickle=args.allow_pickle)
        layers = adapter_of(file, args).layers.values()
        return max((layer.schedule for layer in layers), key=lambda schedule: schedule.r)
    if any(getattr(args, name) for name in _OF_ADAPTERS):
        parser.error("options of a file need --adapter")
    try:
        return RankSchedule(**{"r": 16, **given})
    except (TypeError, ValueError) as error:
        parser.error(str(error))
