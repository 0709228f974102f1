"""`peft-tlora inspect`: what a T-LoRA file says."""

import argparse
import json
from typing import Any

from ..formats.inspection import inspect_file, worst_layers
from .options import add_facts, bold, given_of, warn

HELP = "tell what a T-LoRA file holds"
_SHOWN = 5


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Tell the format of a T-LoRA file, its base model's family, ranks and schedule, and how far"
        " each layer has moved from where it started."
    )
    parser.add_argument("source", help="a file, or a folder with one")
    parser.add_argument("--json", action="store_true", help="everything, for a program")
    parser.add_argument("--all", action="store_true", help="every layer, not the most moved ones")
    add_facts(parser)


def call(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    given = given_of(args, weights=True)
    report = inspect_file(args.source, **given, allow_pickle=args.allow_pickle)
    for text in report["warnings"] if not args.json else ():
        warn(text)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, value in _summary(report).items():
        print(f"{bold(f'{name}:'):<12} {value}")
    layers = report["layers"]
    shown = list(layers) if args.all else worst_layers(layers, _SHOWN)
    if shown:
        print(f"\n{'moved':>8} {'eff. rank':>9} {'r':>4}  layer")
    for name in shown:
        layer = layers[name]
        print(
            f"{_number(layer['moved']):>8} {_number(layer['effective_rank']):>9} "
            f"{layer['rank']:>4}  {name}"
        )
    if len(shown) < len(layers):
        print(f"and {len(layers) - len(shown)} more (--all)")
    return 0


def _summary(report: dict[str, Any]) -> dict[str, object]:
    schedule = report["schedule"]
    kinds = ", ".join(f"{count} {name}" for name, count in report["kinds"].items())
    return {
        "format": f"{report['format']} ({report['format_title']})",
        "size": f"{report['bytes'] / 2**20:.2f} MiB, {report['tensors']} tensors",
        "base": f"{report['family'] or 'unknown family'}, {report['component'] or 'unknown part'}",
        "method": {None: "unknown", True: "T-LoRA", False: "Vanilla T-LoRA"}[report["ortho"]],
        "rank": ", ".join(f"{r} in {n} layers" for r, n in report["ranks"].items()) or "unknown",
        "alpha": f"{_list(report['lora_alpha'])}, scale {_list(report['scaling'])}"
        + ("" if report["scaling"] in ([], [1.0]) else ", not the authors' 1"),
        "schedule": "unknown"
        if schedule is None
        else ", ".join(f"{name}={value}" for name, value in schedule.items()),
        "layers": kinds or "unknown",
    }


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "unknown"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
