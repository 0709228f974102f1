"""The short examples, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder, script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_and_generate(tmp_path):
    assert "wrote my-toy" in run(tmp_path, "train.py", "--steps", "2", "--output", "my-toy")
    assert (tmp_path / "my-toy" / "pytorch_lora_weights.safetensors").exists()
    run(tmp_path, "generate.py", "my-toy", "a photo of a sks toy", "--steps", "2")
    with Image.open(tmp_path / "toy.png") as picture:
        assert picture.size == (64, 64)


SCRIPT = """
import os
import sys

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "BasicTransformerBlock"
accelerator = Accelerator()
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
    cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
).requires_grad_(False)
torch.manual_seed(accelerator.process_index)  # nobody seeds the ranks alike
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], 0.1)
unet, optimizer = accelerator.prepare(unet, optimizer)
x, e = torch.arange(512.).reshape(2, 4, 8, 8).cos(), torch.ones(2, 3, 16)
t = torch.tensor([900, 100])
i = accelerator.process_index
for _ in range(3):
    optimizer.zero_grad()
    accelerator.backward(unet(x[i:i + 1], t[i:i + 1], e[i:i + 1]).sample.square().mean())
    optimizer.step()
state = accelerator.get_state_dict(unet)
if accelerator.is_main_process:
    model = accelerator.unwrap_model(unet)
    torch.save(get_peft_model_state_dict(model, state), sys.argv[1])
    print(accelerator.distributed_type, flush=True)
accelerator.wait_for_everyone()
os._exit(0)  # gloo's threads may keep the interpreter from its end (see test_distributed)
"""


def test_engines_train_the_same_adapter(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for engine, kind in (("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")):
        file = tmp_path / f"{engine}.pt"
        assert kind in run(tmp_path, "engines.py", engine, "script.py", str(file))
        found[engine] = torch.load(file)
    assert found["ddp"].keys() == found["fsdp2"].keys()
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp2"][name], tensor)
    assert any(tensor.any() for name, tensor in found["ddp"].items() if "lora_lambda" in name)


def test_an_unknown_engine_is_named(tmp_path):
    command = [sys.executable, str(EXAMPLES / "engines.py"), "tpu", "script.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ddp|fsdp|fsdp2|zero2|zero3" in done.stderr
