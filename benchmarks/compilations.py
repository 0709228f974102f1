"""How often a model with each adapter is compiled in 30 denoising and 30 training steps.

    python benchmarks/compilations.py

The model is a small U-Net; every step has another timestep, those of training one for each sample.
Both `torch.compile(unet)` and diffusers' `compile_repeated_blocks` are counted, in graphs.
"""

import torch
from diffusers import UNet2DConditionModel
from measure import report
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from peft_tlora import TLoraConfig

STEPS = 30


def small_unet() -> UNet2DConditionModel:
    """A random U-Net of one block each way, the same at each call."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


def count(config: LoraConfig | None, training: bool, repeated_blocks: bool) -> tuple[int, int]:
    """Graphs compiled in the first step, and in all."""
    torch._dynamo.reset()
    unet = small_unet()
    if config is not None:
        unet.add_adapter(config)
    counter = CompileCounter()
    if repeated_blocks:
        unet.compile_repeated_blocks(fullgraph=True, backend=counter)
        model = unet
    else:
        model = torch.compile(unet, fullgraph=True, backend=counter)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    graphs = []
    for t in torch.linspace(990, 10, STEPS):
        timestep = torch.stack([t, 1000 - t]) if training else t
        with torch.set_grad_enabled(training):
            model(x, timestep, text)
        graphs.append(counter.frame_count)
    return graphs[0], graphs[-1]


def main() -> None:
    configs = {
        "base": None,
        "LoRA": LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        "T-LoRA": TLoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    }
    rows = []
    for repeated_blocks in (False, True):
        for training in (False, True):
            for name, config in configs.items():
                first, total = count(config, training, repeated_blocks)
                how = "compile_repeated_blocks" if repeated_blocks else "torch.compile(unet)"
                step = "training" if training else "denoising"
                rows.append([how, step, name, first, total - first])
    head = ["", "steps", "adapter", "graphs of the first step", f"of the other {STEPS - 1}"]
    report("compilations", f"Compilations in {STEPS} timesteps", head, rows)


if __name__ == "__main__":
    main()
