"""Results as lines of JSON, appended as they come: a run that stops goes on where it was."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence.trial import Cell

Record = dict[str, Any]


def load(path: Path) -> list[Record]:
    """All complete records; a line cut off by an interruption is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is not JSON; remove that line, its trial is run again"
                ) from None
    return records


def key(record: Record) -> tuple[Any, ...]:
    """The key of the trial that a record belongs to."""
    return tuple(record[name] for name in ("arm", "concept", "seed", "r", "r_min", "lr"))


def missing(cells: Iterable[Cell], records: list[Record]) -> list[Cell]:
    """The cells that lack a checkpoint, each once."""
    done = {(*key(record), record["step"]) for record in records}
    wanted = {cell.key: cell for cell in cells}
    return [c for c in wanted.values() if any((*c.key, s) not in done for s in c.steps)]


def append(path: Path, cell: Cell, results: Iterable[tuple[int, Record]]) -> None:
    """Write all checkpoints of a cell at once, on lines of their own."""
    settings = {name: value for name, value in asdict(cell).items() if name != "steps"}
    lines = [
        json.dumps({**settings, "step": step, **_rounded(v)}, separators=(",", ":"))
        for step, v in results
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else b""
    kept = whole[: whole.rfind(b"\n") + 1]  # without a line that an interruption cut off
    if kept != whole:
        path.write_bytes(kept)
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _rounded(values: Record) -> Record:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
