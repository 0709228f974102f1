"""Generate with a T-LoRA file: the import is all it takes.

python examples/generate.py my-toy "a photo of a sks toy on a green striped background"
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import peft_tlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", help="folder or file of the adapter")
parser.add_argument("prompt")
parser.add_argument("--model", default=str(Path(__file__).parent / "toybox" / "model"))
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--output", default="toy.png")
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.model)
pipe.load_lora_weights(args.adapter)  # the import lets it recognise the file
generator = torch.Generator().manual_seed(0)
pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0].save(args.output)
print(f"wrote {args.output} with peft_tlora {peft_tlora.__version__}")
