"""Training one adapter on one picture, for any U-Net pipeline of diffusers."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from evidence.arms import Arm

Conditions = dict[str, Any]


def expand(value: Any, batch: int) -> Any:
    """Conditions of one sample, repeated for a batch."""
    if isinstance(value, dict):
        return {name: expand(each, batch) for name, each in value.items()}
    return value.expand(batch, *value.shape[1:])


def attach(unet: Any, arm: Arm, *, r: int, r_min: int, targets: list[str], seed: int) -> None:
    """Freeze the base and add the arm's adapter, initialised from the seed."""
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    unet.add_adapter(arm.config(r, r_min, targets))


def fit(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    conditions: Conditions,
    *,
    band: tuple[float, float],
    lr: float,
    checkpoints: Collection[int],
    batch: int,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train on one picture with the paper's optimizer; pause at each checkpoint.

    Args:
        unet: The denoiser with its adapter.
        scheduler: The scheduler whose noise levels and prediction type the model has.
        latents: The picture, ``(1, channels, height, width)``.
        conditions: Keyword arguments of the denoiser for one sample.
        band: The lowest and highest timestep, as shares of all.
        lr: Learning rate.
        checkpoints: The numbers of steps at which to pause; the last one ends the training.
        batch: Noise levels a step.
        seed: Decides noise and timesteps, the same for every arm.

    Yields:
        The number of steps done, and the mean loss since the last checkpoint.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = [p for p in unet.parameters() if p.requires_grad]
    options = {"lr": lr, "betas": (0.9, 0.999), "weight_decay": 1e-4}
    optimizer = torch.optim.AdamW(weights, **options, fused=True)
    low, high = (round(share * scheduler.config.num_train_timesteps) for share in band)
    pictures, losses = latents.expand(batch, *latents.shape[1:]), []
    repeated = {name: expand(value, batch) for name, value in conditions.items()}
    for step in range(1, max(checkpoints) + 1):
        noise = torch.randn(pictures.shape, generator=rng).to(latents)
        timesteps = torch.randint(low, high, (batch,), generator=rng).to(latents.device)
        noisy = scheduler.add_noise(pictures, noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(pictures, noise, timesteps) if is_velocity else noise
        loss = F.mse_loss(unet(noisy, timesteps, **repeated).sample.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step in checkpoints:
            yield step, float(torch.stack(losses).mean())
            losses.clear()


@contextmanager
def acting_in(unet: Any, band: tuple[float, float], num_train_timesteps: int) -> Iterator[None]:
    """Let the adapter act only at the noise levels it was trained at; the base does the rest."""
    if band == (0.0, 1.0):
        yield
        return

    def switch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        share = float(torch.as_tensor(timestep).flatten()[0]) / num_train_timesteps
        inside = band[0] <= share < band[1] or share == band[1] == 1
        (module.enable_adapters if inside else module.disable_adapters)()

    handle = unet.register_forward_pre_hook(switch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        unet.enable_adapters()
