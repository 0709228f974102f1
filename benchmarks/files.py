"""Size of a file and time to load it: SDXL's attention layers with T-LoRA and with PEFT's LoRA.

    python benchmarks/files.py

The base model is on the meta device, so that only the adapters cost anything. `PeftModel` loads
each file with its defaults, in turn; what was read is in the cache of the operating system.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import interleaved, ratio, report
from peft import LoraConfig, PeftModel, get_peft_model
from sdxl import attention_shapes
from torch import nn

from peft_tlora import TLoraConfig

CONFIGS = {
    "LoRA": (LoraConfig, {}),
    "T-LoRA": (TLoraConfig, {}),
    "T-LoRA, save_initial_factors=True": (TLoraConfig, {"save_initial_factors": True}),
    "Vanilla T-LoRA": (TLoraConfig, {"ortho_init": None}),
}
REPEATS = 5


def base() -> nn.Module:
    """SDXL's attention layers alone, with empty weights that share memory."""
    layers = [
        (f"layer_{outputs}_{inputs}_{i}", nn.Linear(inputs, outputs, bias=False, device="meta"))
        for (outputs, inputs), count in attention_shapes().items()
        for i in range(count)
    ]
    model = nn.ModuleDict(dict(layers))
    for layer in model.values():
        layer.weight = nn.Parameter(torch.zeros(1).expand(layer.weight.shape), requires_grad=False)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return model


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for r in (4, 16, 64):
            sizes, loads = {}, {}
            for config, (cls, options) in CONFIGS.items():
                folder = Path(name) / str(r) / config
                adapter = cls(r=r, target_modules="layer.*", **options)
                get_peft_model(base(), adapter).save_pretrained(folder)
                sizes[config] = (folder / "adapter_model.safetensors").stat().st_size

                def load(repeat: int, folder: Path = folder) -> Callable[[], object]:
                    model = base()
                    return lambda: PeftModel.from_pretrained(model, folder)

                loads[config] = load
            times = interleaved(loads, REPEATS)
            for config, size in sizes.items():
                median, text = sorted(times[config])[REPEATS // 2], ratio(times, config, "LoRA")[1]
                share = f"{size / sizes['LoRA']:.4f}"
                rows.append([r, config, f"{size / 2**20:.2f} MiB", share, f"{median:.2f} s", text])
    head = ["r", "adapter", "file", "file / LoRA's", "loading", "loading / LoRA's"]
    report("files", "Files of SDXL's 560 attention layers, float32", head, rows)


if __name__ == "__main__":
    main()
