"""What adapters cost SDXL's U-Net and FLUX's transformer at full size on a GPU, all in turn.

    python benchmarks/gpu_report.py [--minutes 18] [--rank 16] [--repeats 7] [--tiny]

Random weights in bfloat16, adapters in float32 in all attention projections. Batches of 1 and of 4
with a timestep a sample, on the device as trainers and pipelines have them; training with and
without gradient checkpointing, and denoising; eager and with diffusers' `compile_repeated_blocks`.
All variants share the base's weights. A LoRA fused into them is the base, as far as time goes.
Peaks are of the memory beyond the weights. When the minutes are over, the rest is left out, and
said. Without a GPU nothing is measured, unless `--tiny` proves with small models that all of it
runs.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from measure import device, interleaved, ratio, report
from peers import PEERS, Adapted
from sdxl import TARGETS, inputs, unet
from tiny import Operators
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from peft_tlora import FusedGeneration

FUSED = "T-LoRA, FusedGeneration"
VARIANTS = [peer for peer in PEERS if peer != "naive"]
STEPS = ["training", "training, checkpointing", "denoising"]


def sdxl(tiny: bool) -> UNet2DConditionModel:
    """The U-Net of SDXL with random weights."""
    if not tiny:
        return unet(full=True)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),  # pyright: ignore[reportArgumentType]
        transformer_layers_per_block=(1, 1),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def flux(tiny: bool) -> FluxTransformer2DModel:
    """The transformer of FLUX.1 dev with random weights."""
    size = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2} if tiny else {}
    return FluxTransformer2DModel(guidance_embeds=True, **size)  # pyright: ignore[reportArgumentType]


def flux_inputs(model: FluxTransformer2DModel, batch: int, dtype: torch.dtype) -> dict[str, object]:
    """Random arguments of a forward for 1024 x 1024 pixels, without the timestep."""
    tokens, words = (4096, 512) if model.config["num_layers"] > 2 else (16, 8)
    like = {"device": model.device, "dtype": dtype}
    return {
        "hidden_states": torch.randn(batch, tokens, 64, **like),
        "encoder_hidden_states": torch.randn(batch, words, 4096, **like),
        "pooled_projections": torch.randn(batch, 768, **like),
        "guidance": torch.ones(batch, **like),
        "img_ids": torch.zeros(tokens, 3, **like),
        "txt_ids": torch.zeros(words, 3, **like),
    }


def sharing(model: nn.Module) -> nn.Module:
    """A copy that has the same weights, not equal ones."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


class Case:
    """One model with one batch, kind of step and execution.

    Args:
        models: The variants of the model.
        arguments: Arguments of a forward but for the timestep.
        scale: The timestep of pure noise.
        step: One of `STEPS`.
    """

    def __init__(
        self, models: dict[str, Adapted], arguments: dict[str, object], scale: float, step: str
    ) -> None:
        self.models, self.arguments, self.scale, self.step = models, arguments, scale, step
        self.batch = len(next(t for t in arguments.values() if isinstance(t, Tensor)))

    def run(self, name: str, share: float) -> None:
        """A step at a share of the schedule, samples of a batch spread over it in training."""
        adapted, training = self.models[name], self.step != "denoising"
        shares = torch.full((self.batch,), share)
        if training:
            shares = (shares + torch.arange(self.batch) / self.batch) % 1
        timestep = (self.scale * shares).to(device())
        if adapted.peer == "LyCORIS":
            adapted.set_mask(1000 * (shares if training else share))
        with torch.set_grad_enabled(training):
            output = adapted.model(timestep=timestep, **self.arguments).sample
        if training:
            output.float().square().mean().backward()
            for parameter in adapted.parameters:
                parameter.grad = None

    def names(self) -> list[str]:
        """The variants that do such a step."""
        return [n for n in self.models if n != "base" or self.step == "denoising"]

    def times(self, names: list[str], repeats: int) -> dict[str, list[float]]:
        """Seconds of each variant in each round."""

        def prepared(name: str) -> Callable[[int], Callable[[], None]]:
            return lambda repeat: lambda: self.run(name, (repeat + 0.5) / repeats)

        return interleaved({name: prepared(name) for name in names}, repeats, warmup=2)

    def peak(self, name: str) -> str:
        """Memory of a step beyond what is there before it."""
        if device().type != "cuda":
            return "-"
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(name, 0.3)
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GB"

    def launches(self, name: str) -> int:
        """Kernels of a step; operators where there is no GPU."""
        if device().type != "cuda":
            with Operators() as counted:
                self.run(name, 0.3)
            return sum(counted.names.values())
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.run(name, 0.3)
            torch.cuda.synchronize()
        return sum(event.device_type.name == "CUDA" for event in profiled.events() or ())


@contextmanager
def fused(models: dict[str, Adapted], wanted: bool) -> Iterator[None]:
    """T-LoRA in generation mode under a name of its own."""
    if not wanted:
        yield
        return
    models[FUSED] = models["T-LoRA"]
    try:
        with FusedGeneration(models["T-LoRA"].model):
            yield
    finally:
        del models[FUSED]


def cases(tiny: bool, rank: int) -> Iterator[tuple[str, str, Case]]:
    """Model, execution and case, one after the other."""
    dtype = torch.bfloat16
    for name in ("SDXL", "FLUX"):
        torch.manual_seed(0)
        with device():
            base = sdxl(tiny) if name == "SDXL" else flux(tiny)
        base = base.to(dtype).requires_grad_(False)  # pyright: ignore[reportArgumentType]
        names = [variant for variant in VARIANTS if not (name == "FLUX" and variant == "LyCORIS")]
        models = {v: Adapted(v, sharing(base), rank, TARGETS) for v in names}
        for compiled, step, batch in itertools.product((False, True), STEPS, (1, 4)):
            if compiled and batch == 1 and step == STEPS[0]:
                models.pop("LyCORIS", None)
                for adapted in models.values():
                    adapted.model.compile_repeated_blocks()  # pyright: ignore[reportCallIssue]
            for adapted in models.values():
                toggle = "enable" if step == STEPS[1] else "disable"
                getattr(adapted.model, f"{toggle}_gradient_checkpointing")()
            make = inputs if name == "SDXL" else flux_inputs
            arguments, scale = make(base, batch, dtype), 1000.0 if name == "SDXL" else 1.0  # pyright: ignore[reportArgumentType]
            yield name, "compiled" if compiled else "eager", Case(models, arguments, scale, step)
        del models, base
        if device().type == "cuda":
            torch.cuda.empty_cache()


def measured(case: Case, repeats: int) -> Iterator[list[str]]:
    """The rows of a case, without what they have in common."""
    layers = sum("lora_A.default" in n for n, _ in case.models["LoRA"].model.named_parameters())
    rounds = [(False, case.names())]
    if case.step == "denoising":
        rounds.append((True, ["base", "LoRA", FUSED]))  # its weights change: once more in turn
    for generation, names in rounds:
        with fused(case.models, generation):
            times = case.times(names, repeats)
            least = min(case.launches(name) for name in names)
            for name in names if not generation else [FUSED]:
                middle = 1e3 * sorted(times[name])[repeats // 2]
                more = (case.launches(name) - least) / layers
                yield [
                    name,
                    f"{middle:.1f} ms",
                    ratio(times, name, "LoRA")[1],
                    ratio(times, name, "base")[1] if "base" in times else "",
                    f"{more:.1f}",
                    case.peak(name),
                ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU as well")
    arguments = parser.parse_args()
    if device().type != "cuda" and not arguments.tiny:
        print("No GPU, so nothing was measured. --tiny proves with small models that all runs.")
        return
    end, rows, left = time.monotonic() + 60 * arguments.minutes, [], []
    for model, execution, case in cases(arguments.tiny, arguments.rank):
        what = [model, str(case.batch), case.step, execution]
        if time.monotonic() > end:
            left.append(", ".join(what))
            continue
        try:
            rows += [[*what, *row] for row in measured(case, arguments.repeats)]
        except torch.OutOfMemoryError:
            rows.append([*what, "", "out of memory", "", "", "", ""])
        print(*rows[-1], flush=True)
    size = "scaled down" if arguments.tiny else "full size"
    report(
        "gpu_report_tiny" if arguments.tiny else "gpu_report",
        f"SDXL's U-Net and FLUX's transformer, {size}, bfloat16, r={arguments.rank}",
        [
            "model",
            "batch",
            "step",
            "execution",
            "adapter",
            "median",
            "/ LoRA's",
            "/ base's",
            "launches a layer beyond the fewest",
            "peak",
        ],
        rows,
        f"Medians of {arguments.repeats} rounds; quotients of the same round, quartiles in "
        f"brackets. Left out for time: {'; '.join(left) or 'nothing'}.",
    )


if __name__ == "__main__":
    main()
