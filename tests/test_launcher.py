"""Unedited scripts run with T-LoRA."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
{imports}
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

assert sys.argv[1:] == ["--min-rank", "9", "--help"], sys.argv
assert __name__ == "__main__"
unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
    cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
)
text = CLIPTextModel(CLIPTextConfig(
    vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=8,
))
{add}
unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 3, 16))
print("unet", type(unet.peft_config["default"]).__name__, unet.peft_config["default"].r)
print("text", type(text.peft_config["default"]).__name__)
print("min_rank", getattr(unet.peft_config["default"], "min_rank", None))
"""
ADD = """
unet.add_adapter({config}(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
text.add_adapter({config}(r=2, target_modules=["q_proj"]))
"""


def launch(tmp_path, script, *options):
    path = tmp_path / "train.py"
    path.write_text(script)
    command = [sys.executable, "-m", "peft_tlora", "run", *options, str(path)]
    return subprocess.run(
        [*command, "--min-rank", "9", "--help"], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("imports", "config"),
    [("from peft import LoraConfig", "LoraConfig"), ("import peft", "peft.LoraConfig")],
)
def test_a_denoisers_adapter_becomes_t_lora_and_a_text_encoders_stays_lora(
    tmp_path, imports, config
):
    script = SCRIPT.format(imports=imports, add=ADD.format(config=config))
    done = launch(tmp_path, script, "--min-rank", "1", "--ortho-init", "none")
    assert done.returncode == 0, done.stderr
    assert "unet TLoraConfig 4" in done.stdout
    assert "text LoraConfig" in done.stdout
    assert "min_rank 1" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "is T-LoRA in" in line]
    assert len(lines) == 1
    assert "adapter 'default' of UNet2DConditionModel is T-LoRA in 16 layers" in lines[0]
    assert "lora_alpha=4, scale 1, min_rank=1" in lines[0]
    assert "loading the adapter needs `import peft_tlora`" in done.stderr


def test_text_encoders_too_if_asked(tmp_path):
    script = SCRIPT.format(imports="import peft", add=ADD.format(config="peft.LoraConfig"))
    done = launch(tmp_path, script, "--text-encoders")
    assert "text TLoraConfig" in done.stdout, done.stderr


def test_a_script_that_never_builds_an_adapter_fails_loudly(tmp_path):
    done = launch(tmp_path, "print('trained')")
    assert done.returncode == 1
    assert "made no LoRA adapter for a denoiser" in done.stderr


@pytest.mark.parametrize(("end", "code"), [("raise SystemExit(7)", 7), ("1 / 0", 1)])
def test_exit_codes_and_tracebacks_are_the_scripts(tmp_path, end, code):
    done = launch(tmp_path, f"x = 1\n{end}\n")
    assert done.returncode == code
    if "/" in end:
        assert 'train.py", line 2' in done.stderr
        assert "ZeroDivisionError" in done.stderr


def test_a_bad_option_shows_before_the_script_runs(tmp_path):
    done = launch(tmp_path, "print('begun')", "--schedule-exponent", "-1")
    assert done.returncode == 2
    assert "begun" not in done.stdout
    assert "error: schedule_exponent must be a finite number above 0" in done.stderr
    assert "Traceback" not in done.stderr


HOST = """
def run_blocks(unet, x, sigma):
    return unet.blocks(x)
"""
OWN_BLOCKS = """
import torch, warnings
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from myhost import run_blocks

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Linear(8, 8)
    def forward(self, x, timestep):
        raise AssertionError

warnings.simplefilter("ignore")
net = inject_adapter_in_model(LoraConfig(r=4, target_modules=["blocks"]), Net())
for p in net.parameters():
    p.data += 0.1
run_blocks(net, torch.ones(2, 8), 1.0).sum().backward()
(lam,) = [p.grad for n, p in net.named_parameters() if "lora_lambda" in n]
print("rank", int((lam != 0).sum()))
"""
SAVING = """
import torch
from safetensors.torch import save_file
save_file({n: p.detach() for n, p in net.named_parameters() if "lora" in n}, "out.safetensors")
"""


def test_an_adapter_that_never_saw_a_timestep_ends_with_1_and_the_remedy(tmp_path):
    (tmp_path / "myhost.py").write_text(HOST)
    done = launch(tmp_path, OWN_BLOCKS, "--min-rank", "1")
    assert "rank 4" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "Adapter 'default' of Net never had a timestep" in done.stderr
    assert "--timestep-from module:function:argument" in done.stderr
    constant = launch(tmp_path, OWN_BLOCKS, "--rank-schedule", "constant")
    assert constant.returncode == 0, constant.stderr


def test_a_function_of_the_script_may_have_the_timestep(tmp_path):
    (tmp_path / "myhost.py").write_text(HOST)
    options = ["--min-rank", "1", "--num-train-timesteps", "1"]
    place = ["--timestep-from", "myhost:run_blocks:sigma"]
    done = launch(tmp_path, OWN_BLOCKS, *options, *place)
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stdout
    done = launch(tmp_path, OWN_BLOCKS, "--timestep-from", "myhost:run_blocks")
    assert done.returncode == 2
    assert "is not of three parts" in done.stderr


def test_files_are_named_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "myhost.py").write_text(HOST)
    place = ["--num-train-timesteps", "1", "--timestep-from", "myhost:run_blocks:sigma"]
    done = launch(tmp_path, OWN_BLOCKS + SAVING, *place)
    assert done.returncode == 0, done.stderr
    assert "peft_tlora: out.safetensors holds the trained tensors alone" in done.stderr
    whole = "from peft import get_peft_model_state_dict as whole\n" + SAVING.replace(
        "net.named_parameters()", "whole(net).items()"
    )
    done = launch(tmp_path, OWN_BLOCKS + whole, *place)
    assert "peft_tlora: out.safetensors holds the whole adapter" in done.stderr
