"""Time and memory of inspect and convert on a file of SDXL's 560 attention layers.

    python benchmarks/commands.py

Each command runs in a process of its own; its seconds are without the imports.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import report
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from sdxl import TARGETS, without_weights

from peft_tlora import TLoraConfig

COMMANDS = {
    "inspect": ["inspect", "{file}"],
    "convert --to peft": ["convert", "{file}", "{out}", "--to", "peft"],
    "--to kohya --timestep 500": ["convert", "{file}", "{out}", "--to", "kohya", "--timestep=500"],
    "--to lora --rank 8": ["convert", "{file}", "{out}", "--to", "lora", "--rank", "8"],
    "--to comfyui --bands 8": ["convert", "{file}", "{out}", "--to", "comfyui", "--bands", "8"],
}
_CHILD = """
import contextlib, io, resource, sys, time
import peft_tlora.cli, peft_tlora.commands.convert, peft_tlora.commands.inspect
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    code = peft_tlora.cli.main(sys.argv[1:])
seconds = time.perf_counter() - start
assert not code, code
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write(path: Path, r: int) -> None:
    """An adapter as save_lora_weights writes it, with random trained tensors."""
    model = without_weights()
    inject_adapter_in_model(TLoraConfig(r=r, lora_alpha=r, target_modules=TARGETS), model)
    tensors = get_peft_model_state_dict(model)
    for name, tensor in tensors.items():
        if "lora_schedule" not in name:
            tensors[name] = torch.randn(tensor.shape) / 100
    save_file({f"unet.{name}": t.contiguous() for name, t in tensors.items()}, path)


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a command."""
    child = [sys.executable, "-W", "ignore", "-c", _CHILD, *arguments]
    found = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()
    return float(found[-2]), float(found[-1])


def main() -> None:
    rows: dict[str, list[str]] = {name: [name] for name in COMMANDS}
    head = ["command"]
    with tempfile.TemporaryDirectory() as name:
        for r in (16, 64):
            file = Path(name) / f"{r}.safetensors"
            write(file, r)
            head.append(f"r={r} ({file.stat().st_size / 2**20:.0f} MiB)")
            for number, (command, arguments) in enumerate(COMMANDS.items()):
                out = Path(name) / f"{r}-{number}"
                given = [a.format(file=file, out=out) for a in arguments]
                seconds, memory = run(given)
                rows[command].append(f"{seconds:.1f} s, {memory / 1024:.2f} GiB")
    title = "Commands on a file of SDXL's 560 attention layers, float32"
    report("commands", title, head, list(rows.values()))


if __name__ == "__main__":
    main()
