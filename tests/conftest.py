import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TinyDenoiser(nn.Module):
    """An unknown denoiser: (batch, tokens, 8) in and out, a few kinds of layers."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.time_proj = nn.Linear(1, features)
        self.to_q = nn.Linear(features, features)
        self.to_out = nn.Linear(features, features)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1, 1) / 1000
        return self.to_out(torch.tanh(self.to_q(x + self.time_proj(t))))


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
