"""The short examples, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder, script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_and_generate(tmp_path):
    assert "wrote my-toy" in run(tmp_path, "train.py", "--steps", "2", "--output", "my-toy")
    assert (tmp_path / "my-toy" / "pytorch_lora_weights.safetensors").exists()
    run(tmp_path, "generate.py", "my-toy", "a photo of a sks toy", "--steps", "2")
    with Image.open(tmp_path / "toy.png") as picture:
        assert picture.size == (64, 64)
