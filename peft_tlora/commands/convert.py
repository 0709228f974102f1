"""`peft-tlora convert`: a T-LoRA file into another format."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..formats.adapter import Adapter
from ..formats.bands import write_bands
from ..formats.families import FAMILIES, family_of
from ..formats.lora import LORA_NAMES, write_lora
from ..formats.own import as_file, write_diffusers, write_peft
from ..formats.plain import plain_lora
from ..formats.reading import FORMATS
from ..weights.files import open_file, read_json
from .options import adapter_of, add_facts, warn

HELP = "write a T-LoRA file in another format"
_OWN = {"peft": write_peft, "diffusers": write_diffusers}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PLAIN_OPTIONS = ("timestep", "rank", "bands", "shift", "sigma_range", "dtype")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Convert a T-LoRA file. peft and diffusers keep everything; lora, kohya and comfyui are "
        "plain LoRA at one mask, or with --bands one for each band of timesteps. Reads: "
        + ", ".join(f"{name} ({format.title})" for name, format in FORMATS.items())
        + "."
    )
    option = parser.add_argument
    option("source", help="a file, or a folder with one")
    option("destination", help="the file or folder to write")
    option("--to", required=True, choices=[*_OWN, *LORA_NAMES])
    option("--json", action="store_true", help="what was written, for a program")
    plain = parser.add_argument_group("plain LoRA (lora, kohya, comfyui)")
    plain.add_argument("--timestep", type=float, help="whose mask to take; all ranks without it")
    plain.add_argument("--rank", type=int, help="cut to this rank; exact without it")
    plain.add_argument("--bands", type=int, metavar="K", help="K files, each for some timesteps")
    plain.add_argument("--shift", type=float, help="of a flow model's sampler, for --bands")
    plain.add_argument(
        "--sigma-range",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="of an EDM model's sampler, for --bands",
    )
    plain.add_argument("--dtype", choices=_DTYPES, help="default: fp32")
    plain.add_argument("--family", choices=FAMILIES, help="of the base model, if it isn't told")
    add_facts(parser)


def call(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    given = [name for name in _PLAIN_OPTIONS if getattr(args, name) is not None]
    if args.to in _OWN and given:
        parser.error(f"--{given[0].replace('_', '-')} is for plain LoRA, not for --to {args.to}")
    if args.bands is not None and (args.timestep is not None or args.rank is not None):
        parser.error("--bands chooses the timesteps itself and is exact: no --timestep, no --rank")
    for name in ("shift", "sigma_range"):
        if getattr(args, name) is not None and args.bands is None:
            parser.error(f"--{name.replace('_', '-')} is for --bands")
    file = open_file(args.source, allow_pickle=args.allow_pickle)
    adapter = adapter_of(file, args)
    for note in adapter.notes:
        warn(note)
    if args.to not in _OWN and as_file(args.destination).resolve() == file.path.resolve():
        parser.error("plain LoRA would replace the T-LoRA file that it is made of")
    if args.to not in _OWN and args.bands is None and args.timestep is None:
        warn("all ranks at every timestep, as if there were no noise: choose a mask by --timestep")
    report = _write(adapter, args)
    if args.json:
        print(json.dumps({**report, "layers": len(adapter.layers), "notes": adapter.notes}))
    else:
        print(f"wrote {report['path']} with {len(adapter.layers)} layers")
        if report.get("error"):
            print(f"cutting to rank {args.rank} lost {report['error']:.2%} of the update's norm")
    return 0


def _write(adapter: Adapter, args: argparse.Namespace) -> dict[str, Any]:
    if args.to in _OWN:
        return {"path": str(_OWN[args.to](adapter, args.destination))}
    told = family_of(adapter.layers)
    family = args.family or told
    if told not in (None, family):
        raise ValueError(f"The layers are those of {told}, not of {family}: leave --family out.")
    dtype = _DTYPES[args.dtype or "fp32"]
    if args.bands is not None:
        folder = Path(args.destination)
        write_bands(
            adapter,
            folder,
            count=args.bands,
            to=args.to,
            family=family,
            shift=args.shift,
            sigma_range=None if args.sigma_range is None else tuple(args.sigma_range),
            dtype=dtype,
        )
        return {"path": str(folder), "bands": len(read_json(folder / "bands.json")["bands"])}
    lora = plain_lora(adapter, timestep=args.timestep, rank=args.rank, dtype=dtype)
    path = write_lora(lora, args.destination, args.to, family=family)
    return {"path": str(path), "error": lora.error}
