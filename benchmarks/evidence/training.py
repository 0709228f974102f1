"""Training one adapter on one picture, for any denoiser of diffusers."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from evidence.arms import Arm

NUM_TRAIN_TIMESTEPS = 1000  # of every model here
Conditions = dict[str, Any]
# from clean inputs, noise and timesteps (batch,): noisy inputs, the denoiser's timestep, the target
Noising = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]


def attach(denoiser: Any, arm: Arm, *, r: int, r_min: int, targets: list[str], seed: int) -> None:
    """Freeze the base and add the arm's adapter, initialised from the seed."""
    denoiser.requires_grad_(False)
    torch.manual_seed(seed)
    denoiser.add_adapter(arm.config(r, r_min, targets))


def noising_of(scheduler: Any) -> Noising:
    """How a model of this scheduler's noise levels and prediction type is trained."""

    def noised(
        clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(clean, noise, timesteps) if is_velocity else noise
        return scheduler.add_noise(clean, noise, timesteps), timesteps, target

    return noised


def fit(
    denoiser: Any,
    clean: torch.Tensor,
    conditions: Conditions,
    noising: Noising,
    *,
    lr: float,
    checkpoints: Collection[int],
    seed: int,
    band: tuple[float, float] = (0.0, 1.0),
) -> Iterator[tuple[int, float]]:
    """Train on one picture with the paper's optimizer; pause at each checkpoint.

    Args:
        denoiser: The denoiser with its adapter.
        clean: Its input without noise, ``(batch, ...)``: the picture, repeated for as many noise
            levels as a step shall have.
        conditions: Its other keyword arguments, for the same batch.
        noising: What the model is trained to predict.
        lr: Learning rate.
        checkpoints: The numbers of steps at which to pause; the last one ends the training.
        seed: Decides noise and timesteps, the same for every arm.
        band: The lowest and highest timestep, as shares of all.

    Yields:
        The number of steps done, and the mean loss since the last checkpoint.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = [p for p in denoiser.parameters() if p.requires_grad]
    options = {"lr": lr, "betas": (0.9, 0.999), "weight_decay": 1e-4}
    optimizer = torch.optim.AdamW(weights, **options, fused=True)
    low, high = (round(share * NUM_TRAIN_TIMESTEPS) for share in band)
    losses = []
    for step in range(1, max(checkpoints) + 1):
        noise = torch.randn(clean.shape, generator=rng).to(clean)
        timesteps = torch.randint(low, high, (len(clean),), generator=rng).to(clean.device)
        noisy, timestep, target = noising(clean, noise, timesteps)
        predicted = denoiser(noisy, timestep=timestep, **conditions).sample
        loss = F.mse_loss(predicted.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step in checkpoints:
            yield step, float(torch.stack(losses).mean())
            losses.clear()


@contextmanager
def acting_in(unet: Any, band: tuple[float, float]) -> Iterator[None]:
    """Let the adapter act only at the noise levels it was trained at; the base does the rest."""
    if band == (0.0, 1.0):
        yield
        return

    def switch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        share = float(torch.as_tensor(timestep).flatten()[0]) / NUM_TRAIN_TIMESTEPS
        inside = band[0] <= share < band[1] or share == band[1] == 1
        (module.enable_adapters if inside else module.disable_adapters)()

    handle = unet.register_forward_pre_hook(switch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        unet.enable_adapters()
