"""Pretraining of the text encoder: its last states must tell what the caption asks for.

Left to the denoiser's loss alone, a text encoder this small learns the background colour first and
everything else very late; this minute of supervised training saves the denoiser tens of them.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from toybox import model
from toybox.loop import SEED, Curve, cosine, generator, optimize, save_atomically
from toybox.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    TEXTURES,
    Scene,
    sample_caption,
    sample_scene,
)

CHOICES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "background": COLOURS,
    "texture": TEXTURES,
    "position": tuple(POSITIONS),
}


def labels(scene: Scene, text: str) -> list[int]:
    """What the caption says about each attribute; the last class of each is "unsaid"."""
    said = {
        "shape": f"{scene.shape}" in text,
        "colour": f"{scene.colour} {scene.shape}" in text or f"{scene.colour} toy" in text,
        "background": f"on a {scene.background}" in text,
        "texture": f"{scene.texture} background" in text,
        "position": scene.position in text,
    }
    return [
        choices.index(getattr(scene, name)) if said[name] else len(choices)
        for name, choices in CHOICES.items()
    ]


def train_text(work: Path, steps: int, batch: int = 64) -> None:
    """Read every attribute linearly from the states behind the caption's end; saves ``text.pt``."""
    torch.manual_seed(SEED)
    tokenizer, curve = model.build_tokenizer(), Curve(work / "text.jsonl")
    encoder = model.build_text_encoder(tokenizer)
    sizes = [len(choices) + 1 for choices in CHOICES.values()]
    head = torch.nn.Linear(model.TEXT_WIDTH, sum(sizes))
    weights = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-2)
    for step in range(steps):
        indices = torch.randint(10**9, (batch,), generator=generator(step)).tolist()
        scenes = [sample_scene(SEED, i) for i in indices]
        texts = [sample_caption(s, SEED, i) for s, i in zip(scenes, indices, strict=True)]
        targets = torch.tensor([labels(s, t) for s, t in zip(scenes, texts, strict=True)])
        ids = model.tokenize(tokenizer, texts)
        logits = head(encoder(ids).last_hidden_state).split(sizes, -1)
        ended = ids == tokenizer.eos_token_id
        losses, hits = [], []
        for part, target in zip(logits, targets.T, strict=True):
            spread = target[:, None].expand_as(ids)[ended]
            losses.append(F.cross_entropy(part[ended], spread))
            hits.append((part[ended].argmax(-1) == spread).float().mean())
        optimize(optimizer, torch.stack(losses).sum(), cosine(step, steps, 2e-3, warmup=50))
        if (step + 1) % 50 == 0:
            curve.log(step=step + 1, loss=sum(losses).item(), accuracy=min(hits).item())
    save_atomically({"text_encoder": encoder.state_dict()}, work / "text.pt")
