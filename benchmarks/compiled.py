"""Time of a compiled transformer block with T-LoRA, divided by that with LoRA, compiled too.

    python benchmarks/compiled.py [--widths 64] [--dtypes float32] [--repeats 41] [--rank 16]

A block of diffusers, all of whose linear layers are adapted, is compiled whole and called with a
batch of two, with one timestep and with one a sample, as tensors. Adapters are in float32.
"""

import argparse
from collections.abc import Callable

import torch
from diffusers.models.attention import BasicTransformerBlock
from measure import device, interleaved, ratio, report
from peft import LoraConfig, get_peft_model
from tiny import step, trained_of
from torch import nn

from peft_tlora import TLoraConfig

TOKENS = 256
MODELS = {"LoRA": LoraConfig, "T-LoRA": TLoraConfig}


class Denoiser(nn.Module):
    """A block of self-attention, cross-attention to a fixed text, and a feed-forward network."""

    text: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(width, width // 32, 32, cross_attention_dim=width)
        self.register_buffer("text", torch.randn(2, 77, width))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.block(sample, encoder_hidden_states=self.text)


def model_of(name: str, width: int, r: int, dtype: torch.dtype) -> nn.Module:
    """A compiled denoiser with an adapter that isn't new."""
    torch.manual_seed(0)
    config = MODELS[name](r=r, lora_alpha=r, target_modules="all-linear")
    model = get_peft_model(Denoiser(width).to(dtype), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.02 * torch.randn_like(parameter)
    return torch.compile(model.to(device()), fullgraph=True)  # pyright: ignore[reportReturnType]


def timed(model: nn.Module, x: torch.Tensor, kind: str, backward: bool) -> Callable:
    """What prepares a step, with other timesteps each time."""
    trained = trained_of(model, backward)

    def prepare(repeat: int) -> Callable[[], None]:
        t = torch.tensor([10.0 + repeat, 900.0 - repeat], device=device())
        return lambda: step(model, x, t if kind == "one a sample" else t[:1], trained)

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    rows = []
    for width in arguments.widths:
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 32  # the models share their code
            models = {name: model_of(name, width, arguments.rank, dtype) for name in MODELS}
            x = torch.randn(2, TOKENS, width, device=device(), dtype=dtype)
            for kind in ("one", "one a sample"):
                for backward in (False, True):
                    cases = {n: timed(m, x, kind, backward) for n, m in models.items()}
                    times = interleaved(cases, arguments.repeats, warmup=3)
                    middle = sorted(times["LoRA"])[arguments.repeats // 2]
                    step_name = "both" if backward else "forward"
                    dtype_name = str(dtype).removeprefix("torch.")
                    rows.append([width, dtype_name, step_name, kind, f"{1e3 * middle:.2f} ms"])
                    rows[-1].append(ratio(times, "T-LoRA", "LoRA")[1])
                    print(rows[-1], flush=True)
    report(
        "compiled",
        f"A compiled transformer block with its adapter, r = {arguments.rank}",
        ["width", "dtype of the base", "step", "timestep", *MODELS],
        rows,
        "Behind LoRA's medians the time divided by LoRA's of the same round: median and quartiles "
        f"of {arguments.repeats} rounds.",
    )


if __name__ == "__main__":
    main()
