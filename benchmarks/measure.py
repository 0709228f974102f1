"""Interleaved timing and tables that say where they were made."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "peft", "diffusers", "lycoris-lora")


def device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> str:
    """Device, threads and versions, for the head of a table."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    return ", ".join([name, *(f"{package} {_version(package)}" for package in PACKAGES)])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[int], Callable[[], object]]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, run in turn.

    Args:
        functions: For a repeat's number, what is to be timed in it: the preparation isn't timed.
        repeats: How often.
        warmup: Further rounds before, which don't count.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-warmup, repeats):
        for name, prepare in functions.items():
            elapsed = seconds(prepare(max(repeat, 0)))
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> tuple[float, str]:
    """Median of the ratios of each round, and a text with the quartiles."""
    ratios = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
    median = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median, f"{median:.2f} ({quartiles[0]:.2f} to {quartiles[2]:.2f})"


def report(
    name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[object]], notes: str = ""
) -> None:
    """Print a table and write it to `results/<name>.md`."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    text = "\n".join(
        [f"# {title}", "", environment(), "", *lines, "", *([notes, ""] * bool(notes))]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
