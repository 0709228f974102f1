"""A training loop of one's own: DreamBooth on one picture, as with LoRA.

python examples/train.py --output my-toy
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from PIL import Image, ImageOps

from peft_tlora import TLoraConfig  # in the place of peft.LoraConfig

HERE = Path(__file__).parent

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(HERE / "toybox" / "model"))
parser.add_argument("--image", default=str(HERE / "toybox" / "concept.png"))
parser.add_argument("--prompt", default="a photo of a sks toy")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--output", default="my-toy")
args = parser.parse_args()

torch.manual_seed(0)
pipe = DiffusionPipeline.from_pretrained(args.model)
for part in (pipe.unet, pipe.vae, pipe.text_encoder):
    part.requires_grad_(False)
config = TLoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
pipe.unet.add_adapter(config)

picture = ImageOps.exif_transpose(Image.open(args.image)).convert("RGBA")
picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
with torch.no_grad():
    pixels = pipe.image_processor.preprocess(ImageOps.fit(picture, (64, 64)))
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt(args.prompt, "cpu", 1, do_classifier_free_guidance=False)[0]
optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=1e-3)
for step in range(args.steps):
    noise, timestep = torch.randn_like(latents), torch.randint(1000, (1,))
    noisy = pipe.scheduler.add_noise(latents, noise, timestep)
    target = pipe.scheduler.get_velocity(latents, noise, timestep)
    loss = (pipe.unet(noisy, timestep, text).sample - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
pipe.save_lora_weights(args.output, unet_lora_layers=weights)
print(f"wrote {args.output}")
