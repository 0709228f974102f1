"""Train the toybox from rendered scenes, in stages: vae, decoder, text, denoiser, export.

    cd examples && python -m toybox.train vae

Every step draws its randomness from ``(seed, step)``, so a resumed run continues the same run.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as F

from toybox import autoencoder, gate, model
from toybox.loop import SEED, Curve, cosine, generator, optimize, save_atomically
from toybox.odd import sample_odd_scene
from toybox.scenes import caption, sample_scene
from toybox.text import train_text

CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998
WARMUP = 250  # steps in which the captions are learned: whole ones, in little but noise
LAYOUT = 800  # steps until the layout is learned, which the high noise levels decide
LAYOUT_BIAS, DETAIL_BIAS = 0.6, 1.0  # exponents of the noise level before and after
FULL_CAPTIONS = 0.6  # share of whole captions beyond those that happen to be drawn


class Trainee(torch.nn.Module):
    """The denoiser and the text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = model.build_tokenizer()
        self.text_encoder = model.build_text_encoder(self.tokenizer)
        self.unet = model.build_unet()
        self.scheduler = model.build_scheduler()
        self.empty = model.tokenize(self.tokenizer, [""])

    def loss(
        self, x: torch.Tensor, ids: torch.Tensor, rng: torch.Generator, lowest: float, bias: float
    ) -> torch.Tensor:
        """The v-prediction loss of a batch, with stratified timesteps and dropped captions.

        Args:
            x: Latents, ``(batch, channels, 8, 8)``.
            ids: Tokens of the captions, ``(batch, tokens)``.
            rng: The source of everything random.
            lowest: The lowest noise level in use, in [0, 1).
            bias: Exponent of the noise level; below 1 there are more of the high ones.
        """
        batch = len(x)
        dropped = torch.rand(batch, 1, generator=rng) < CAPTION_DROPOUT
        ids = torch.where(dropped, self.empty, ids)
        strata = torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)
        levels = lowest + (1 - lowest) * (strata / batch) ** bias
        timesteps = (levels * self.scheduler.config["num_train_timesteps"]).long()
        noise = torch.randn(x.shape, generator=rng)
        noisy = self.scheduler.add_noise(x, noise, timesteps)
        states = self.text_encoder(ids).last_hidden_state
        velocity = self.unet(noisy, timesteps, states).sample
        return F.mse_loss(velocity, self.scheduler.get_velocity(x, noise, timesteps))

    def pipeline(self, work: Path) -> StableDiffusionPipeline:
        """The current weights and the trained autoencoder as a pipeline."""
        vae = autoencoder.load_autoencoder(work)
        return model.build_pipeline(vae, self.unet, self.text_encoder, self.tokenizer)


def quick_gate(average: Trainee, work: Path, count: int = 50) -> dict[str, float]:
    """The gate's rates on a few held-out prompts."""
    scenes = gate.held_out_scenes(count, seed=1)
    pictures = gate.generate(average.pipeline(work), [caption(s) for s in scenes])
    return gate.score(pictures, scenes)


@torch.no_grad()
def update_average(average: Trainee, trainee: Trainee, step: int) -> None:
    """Move the averaged weights towards the current ones."""
    rate = 1 - min(EMA_DECAY, (1 + step) / (10 + step))
    for target, source in zip(average.parameters(), trainee.parameters(), strict=True):
        target.lerp_(source, rate)


def encoded(work: Path, odd_share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, captions and whole captions: of the scenes, and behind them of the odd toys."""
    parts = [autoencoder.encode_pool(work)]
    scenes = [sample_scene(SEED, i) for i in range(autoencoder.POOL)]
    if odd_share > 0:
        parts.append(autoencoder.encode_odd_pool(work))
        scenes += [sample_odd_scene(SEED, i) for i in range(autoencoder.ODD)]
    latents, ids = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return latents, ids, autoencoder.full_caption_ids(scenes)


def train_denoiser(work: Path, args: argparse.Namespace) -> None:
    """Train denoiser and text encoder on the encoded pool, or go on from the checkpoint."""
    torch.manual_seed(SEED)
    latents, ids, full_ids = encoded(work, args.odd_share)
    trainee, path = Trainee(), work / "denoiser.pt"
    trainee.text_encoder.load_state_dict(torch.load(work / "text.pt")["text_encoder"])
    average = copy.deepcopy(trainee).eval()
    optimizer = torch.optim.AdamW(trainee.parameters(), betas=(0.9, 0.99), weight_decay=1e-2)
    parts = {"trainee": trainee, "average": average, "optimizer": optimizer}
    step, curve, losses = 0, Curve(work / "denoiser.jsonl"), []
    if path.exists():
        state = torch.load(path)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step = state["step"]
    deadline = time.monotonic() + 60 * args.minutes
    while step < args.steps and time.monotonic() < deadline:
        rng = generator(step)
        rows = torch.randint(autoencoder.POOL, (args.batch,), generator=rng)
        odd = torch.rand(args.batch, generator=rng) < args.odd_share
        if odd.any():
            others = torch.randint(autoencoder.POOL, len(latents), (args.batch,), generator=rng)
            rows = torch.where(odd, others, rows)
        columns = torch.randint(autoencoder.CAPTIONS, (args.batch,), generator=rng)
        warming = step < WARMUP
        whole = torch.rand(args.batch, 1, generator=rng) < (1.0 if warming else FULL_CAPTIONS)
        captions = torch.where(whole, full_ids[rows], ids[rows, columns])
        bias = LAYOUT_BIAS if step < LAYOUT else DETAIL_BIAS
        loss = trainee.loss(latents[rows], captions, rng, 0.8 if warming else 0.0, bias)
        optimize(optimizer, loss, cosine(step, args.steps, args.lr))
        update_average(average, trainee, step)
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            curve.log(step=step, loss=sum(losses) / len(losses))
            losses.clear()
        if step % args.save_every == 0 or step == args.steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_atomically({**states, "step": step}, path)
        if step % args.gate_every == 0:
            curve.log(step=step, **quick_gate(average, work))


def export(work: Path, folder: Path) -> None:
    """Write the averaged weights of the last checkpoint as an fp16 pipeline folder."""
    average, state = Trainee().eval(), torch.load(work / "denoiser.pt")
    average.load_state_dict(state["average"])
    model.export(average.pipeline(work), folder)
    print(f"exported step {state['step']} to {folder}")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("vae", "decoder", "text", "denoiser", "export"))
    parser.add_argument("--work", type=Path, default=Path("~/.cache/peft_tlora/toybox"))
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--vae-full-steps", type=int, default=250, help="at the end, uncropped")
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=5000, help="length of the cosine schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier than that")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--odd-share", type=float, default=0.0, help="share of odd toys")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--gate-every", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=gate.MODEL, help="where to export")
    args = parser.parse_args()
    work = args.work.expanduser()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    stages = {
        "vae": lambda: autoencoder.train_vae(work, args.vae_steps, args.vae_full_steps),
        "decoder": lambda: autoencoder.polish_decoder(work, args.decoder_steps),
        "text": lambda: train_text(work, args.text_steps),
        "denoiser": lambda: train_denoiser(work, args),
        "export": lambda: export(work, args.folder),
    }
    stages[args.stage]()


if __name__ == "__main__":
    main()
