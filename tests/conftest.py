import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_tlora import TLoraConfig
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TinyDenoiser(nn.Module):
    """A denoiser: (batch, tokens, 8) in and out, a few kinds of layers."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.time_proj = nn.Linear(1, features)
        self.to_q = nn.Linear(features, features)
        self.to_out = nn.Linear(features, features)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1, 1) / 1000
        return self.to_out(torch.tanh(self.to_q(x + self.time_proj(t))))


# what a user does for classes of their own
DENOISERS["tests:TinyDenoiser"] = Denoiser()
for _name in ("torch:Sequential", "tests:TinyModel"):
    DENOISERS[_name] = None


@pytest.fixture
def denoiser():
    return TinyDenoiser().eval()


@pytest.fixture
def unet():
    return tiny_unet()


def tiny_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def perturb(model: nn.Module, scale: float = 0.3, seed: int = 1) -> None:
    """Move all trained adapter weights away from their initial values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (scale * noise).to(parameter.device, parameter.dtype)


def crash_after(monkeypatch, written):
    """Let the program end after it has written a number of files."""
    fsync, left = os.fsync, iter(range(written))

    def crash(handle):
        if next(left, None) is None:
            raise RuntimeError("power cut")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", crash)


def crash_while_moving(monkeypatch, name):
    """Let the program end before a file takes the place of an old one of that name."""
    replace = Path.replace

    def crash(path, target):
        if path.name == name == Path(target).name:
            raise RuntimeError("power cut")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", crash)


def first_layer(model):
    return next(name for name, module in model.named_modules() if hasattr(module, "lora_lambda"))


class Watch:
    """The timestep of each call of a denoiser, and the active rank that one of its layers saw."""

    def __init__(self, model):
        self.calls = []
        layer = model.get_submodule(first_layer(model))
        self.schedule = layer.lora_variant["toy"].ranks.schedule
        layer.register_forward_hook(self.see)

    def see(self, layer, args, output):
        timestep = layer.timestep_state.current()
        rank = timestep.active_rank(self.schedule)
        self.calls.append((float(torch.as_tensor(timestep.value).max()), int(rank.min())))


def assert_masks_follow(watch, scheduler, calls=1, scale=1.0):
    """Check what was seen of the last timesteps of a scheduler, the noisiest first.

    The denoiser is called `calls` times at each, with the timestep divided by `scale`.
    """
    expected = [float(t) / scale for t in scheduler.timesteps for _ in range(calls)]
    seen = [t for t, _ in watch.calls]
    assert len(seen) >= 2
    assert seen == pytest.approx(expected[-len(seen) :], rel=1e-5)
    ranks = [rank for _, rank in watch.calls]
    assert ranks == [watch.schedule.active_rank(torch.tensor(t)).item() for t in seen]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 1


CONFIG = {"r": 4, "min_rank": 1, "target_modules": ["to_q", "to_out"], "init_seed": 0}


def adapted(model=None, **kwargs):
    model = get_peft_model(model or TinyDenoiser(), TLoraConfig(**{**CONFIG, **kwargs}))
    perturb(model)
    return model


def ranks_seen(model, *args, **kwargs):
    """The active ranks of every masked layer of one forward, told by which lambdas got gradient."""
    model.zero_grad()
    output = model(*args, **kwargs)
    (output if isinstance(output, torch.Tensor) else output.sample).square().sum().backward()
    return {
        name: int((parameter.grad != 0).sum())
        for name, parameter in model.named_parameters()
        if "lora_lambda" in name and parameter.grad is not None
    }
