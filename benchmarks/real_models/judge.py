"""CLIP's and DINO's features of pictures and prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"


class Judge:
    """CLIP and DINO, for pictures and prompts."""

    def __init__(self, clip: Any, clip_processor: Any, dino: Any, dino_processor: Any) -> None:
        self.clip, self.clip_processor = clip.eval(), clip_processor
        self.dino, self.dino_processor = dino.eval(), dino_processor

    @classmethod
    def pretrained(cls, device: str) -> "Judge":
        from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

        clip: Any = CLIPModel.from_pretrained(CLIP)  # its `to` is typed as a bare function
        return cls(
            clip.to(device),
            CLIPProcessor.from_pretrained(CLIP),
            AutoModel.from_pretrained(DINO).to(device),
            AutoImageProcessor.from_pretrained(DINO),
        )

    @torch.no_grad()
    def clip_images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit features, ``(batch, features)``."""
        inputs = self.clip_processor(images=list(pictures), return_tensors="pt")
        states = self.clip.vision_model(**inputs.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.visual_projection(states), dim=-1)

    @torch.no_grad()
    def clip_texts(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self.clip_processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True
        )
        states = self.clip.text_model(**inputs.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.text_projection(states), dim=-1)

    @torch.no_grad()
    def dino_images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self.dino_processor(images=list(pictures), return_tensors="pt")
        states = self.dino(**inputs.to(self.dino.device)).last_hidden_state[:, 0]
        return F.normalize(states, dim=-1)
