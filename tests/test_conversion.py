"""PEFT's conversion to plain LoRA."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import save_as_lora

from peft_tlora import TLoraConfig, timestep_context

from .conftest import TinyDenoiser, perturb, tiny_unet


def base_model():
    torch.manual_seed(0)
    return TinyDenoiser().eval()


def adapted(base, **fields):
    fields = {"r": 4, "min_rank": 1, "lora_alpha": 6, **fields}
    model = get_peft_model(base, TLoraConfig(**fields)).eval()
    perturb(model)
    return model


@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("t", [None, 1000, 300])
def test_the_result_has_one_mask_and_that_is_said(tmp_path, t, ortho):
    model = adapted(base_model(), target_modules=["to_q", "to_out"], ortho_init=ortho)
    context = nullcontext() if t is None else timestep_context(model, t)
    with context, pytest.warns(UserWarning, match="Converting a T-LoRA adapter fixes its mask"):
        save_as_lora(tmp_path, model, rank=8)
    plain = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    x, time = torch.randn(2, 3, 8), torch.tensor(0 if t is None else t)
    torch.testing.assert_close(plain(x, time), model(x, time), atol=1e-5, rtol=1e-5)


def test_convolutions_are_refused_as_those_of_lora_are(tmp_path):
    model = adapted(tiny_unet(), target_modules=["conv1", "to_q"])
    with (
        pytest.warns(UserWarning, match="fixes its mask"),
        pytest.raises(TypeError, match=r"do not support LoRA conversion: .*Conv2d"),
    ):
        save_as_lora(tmp_path, model, rank=8)
    assert not list(tmp_path.iterdir())
