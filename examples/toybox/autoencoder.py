"""The autoencoder's training, and the encoded pool of scenes that the denoiser learns from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

from toybox import model
from toybox.loop import SEED, Curve, cosine, generator, optimize, save_atomically
from toybox.odd import render_odd, sample_odd_scene
from toybox.scenes import POSITIONS, SIZE, Scene, caption, render, sample_caption, sample_scene

POOL, ODD = 20_000, 10_000
CAPTIONS = 4


def load_pool(work: Path) -> torch.Tensor:
    """The scenes as uint8, shape ``(POOL, 3, SIZE, SIZE)``; rendered on the first call."""
    return _rendered(work / "pool.npy", POOL, lambda i: render(sample_scene(SEED, i)))


def load_odd_pool(work: Path) -> torch.Tensor:
    """The odd toys as uint8, shape ``(ODD, 3, SIZE, SIZE)``; rendered on the first call."""
    return _rendered(work / "odd-pool.npy", ODD, lambda i: render_odd(sample_odd_scene(SEED, i)))


def _rendered(path: Path, count: int, draw: Callable[[int], Image.Image]) -> torch.Tensor:
    if not path.exists():
        pictures = [np.asarray(draw(i)) for i in range(count)]
        np.save(path, np.stack(pictures).transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(path))


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """Map uint8 pictures to the autoencoder's range [-1, 1]."""
    return pictures.float() / 127.5 - 1


def object_crops(pool: torch.Tensor, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Crops of half the side around the objects: four times cheaper, and where the detail is."""
    half, crops = SIZE // 2, []
    shifts = torch.randint(-12, 13, (len(rows), 2), generator=rng)
    for row, shift in zip(rows.tolist(), shifts.tolist(), strict=True):
        centre = POSITIONS[sample_scene(SEED, row).position]
        # Aligned to the latent grid, as whole pictures are.
        x, y = (
            min(max(c + d - half // 2, 0), half) // 8 * 8
            for c, d in zip(centre, shift, strict=True)
        )
        crops.append(pool[row, :, y : y + half, x : x + half])
    return torch.stack(crops)


def train_vae(work: Path, steps: int, full_steps: int) -> None:
    """Train with L1, L2 and a tiny KL term, on crops until ``full_steps`` remain."""
    torch.manual_seed(SEED)
    pool, vae, path = load_pool(work), model.build_vae(), work / "vae.pt"
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    first, curve = 0, Curve(work / "vae.jsonl")
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, steps):
        rng = generator(step)
        rows = torch.randint(len(pool), (16,), generator=rng)
        cropped = step < steps - full_steps
        x = as_input(object_crops(pool, rows, rng) if cropped else pool[rows])
        latents = vae.encode(x).latent_dist
        decoded = vae.decode(latents.sample(generator=rng)).sample
        l1, l2 = F.l1_loss(decoded, x), F.mse_loss(decoded, x)
        kl = latents.kl().mean() / latents.mean[0].numel()
        optimize(optimizer, l1 + 2 * l2 + 2e-5 * kl, cosine(step, steps, 1.5e-3))
        if (step + 1) % 50 == 0:
            curve.log(step=step + 1, l1=l1.item(), l2=l2.item(), kl=kl.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically({**state, "step": step + 1}, path)


@torch.no_grad()
def standardize(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Fold into the 1 x 1 convolutions that each latent channel has mean 0 and deviation 1."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    count = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:count] /= std[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / std
    before.bias[count:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[:, None, None]
    return (latents - mean[:, None, None]) / std[:, None, None]


def encode_pool(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents ``(POOL, C, 8, 8)`` and caption ids ``(POOL, CAPTIONS, T)``, made on first call."""
    path = work / "encoded.pt"
    if not path.exists():
        pool, vae = load_pool(work), model.build_vae()
        vae.load_state_dict(torch.load(work / "vae.pt")["vae"])
        with torch.no_grad():
            chunks = [vae.encode(as_input(x)).latent_dist.mean for x in pool.split(50)]
        latents = standardize(vae, torch.cat(chunks))
        save_atomically({"vae": vae.state_dict()}, work / "autoencoder.pt")
        ids = caption_ids([sample_scene(SEED, i) for i in range(len(pool))])
        save_atomically({"latents": latents, "ids": ids}, path)
    state = torch.load(path)
    return state["latents"], state["ids"]


def encode_odd_pool(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents ``(ODD, C, 8, 8)`` and caption ids ``(ODD, CAPTIONS, T)``, made on first call."""
    path = work / "odd-encoded.pt"
    if not path.exists():
        pool, vae = load_odd_pool(work), load_autoencoder(work)
        with torch.no_grad():
            chunks = [vae.encode(as_input(x)).latent_dist.mean for x in pool.split(50)]
        ids = caption_ids([sample_odd_scene(SEED, i) for i in range(len(pool))])
        save_atomically({"latents": torch.cat(chunks), "ids": ids}, path)
    state = torch.load(path)
    return state["latents"], state["ids"]


def caption_ids(scenes: list[Scene]) -> torch.Tensor:
    """Tokens of ``CAPTIONS`` random captions for each scene, ``(scenes, CAPTIONS, T)``."""
    captions = [
        sample_caption(scene, SEED, i * CAPTIONS + k)
        for i, scene in enumerate(scenes)
        for k in range(CAPTIONS)
    ]
    return model.tokenize(model.build_tokenizer(), captions).view(len(scenes), CAPTIONS, -1)


def full_caption_ids(scenes: list[Scene]) -> torch.Tensor:
    """Tokens of the whole captions of scenes, ``(scenes, T)``."""
    captions = [caption(scene, noun="toy" if scene.inner else None) for scene in scenes]
    return model.tokenize(model.build_tokenizer(), captions)


def load_autoencoder(work: Path) -> AutoencoderKL:
    """The trained autoencoder with standardized latents."""
    vae = model.build_vae()
    vae.load_state_dict(torch.load(work / "autoencoder.pt")["vae"])
    return vae


def polish_decoder(work: Path, steps: int) -> None:
    """Train the decoder alone for longer: the latents, and so the denoiser, stay valid."""
    pool, odd, vae = load_pool(work), load_odd_pool(work), load_autoencoder(work)
    latents = torch.cat([encode_pool(work)[0], encode_odd_pool(work)[0]])
    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4)
    curve = Curve(work / "decoder.jsonl")
    for step in range(steps):
        rng = generator(step + 1_000_000)
        rows = torch.cat([torch.randint(len(p), (8,), generator=rng) for p in (pool, odd)])
        pictures = torch.cat([pool[rows[:8]], odd[rows[8:]]])
        rows[8:] += len(pool)
        noise = torch.randn(latents[rows].shape, generator=rng)
        decoded = vae.decode(latents[rows] + 0.05 * noise).sample
        x = as_input(pictures)
        l1, l2 = F.l1_loss(decoded, x), F.mse_loss(decoded, x)
        optimize(optimizer, l1 + 2 * l2, cosine(step, steps, 1e-3))
        if (step + 1) % 50 == 0:
            curve.log(step=step + 1, l1=l1.item(), l2=l2.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_atomically({"vae": vae.state_dict()}, work / "autoencoder.pt")
