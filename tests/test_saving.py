"""What a host saves in its own way is named: which file, what it lacks, how to complete it."""

import json
import shlex
import warnings

import pytest
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from peft_tlora import TLoraConfig, load_tlora_weights
from peft_tlora.cli import main
from peft_tlora.hosts import saving

from .conftest import TinyDenoiser, perturb, tiny_unet


@pytest.fixture(autouse=True)
def _no_adapters_of_other_tests(monkeypatch):
    monkeypatch.setattr(saving, "_configs", set())


def trained_unet(**kwargs):
    unet = tiny_unet()
    unet.add_adapter(
        TLoraConfig(r=4, min_rank=2, target_modules=["to_q", "to_v"], init_seed=7, **kwargs)
    )
    perturb(unet)
    return unet


def trained_tensors(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def save_half(model, path):
    with pytest.warns(UserWarning, match="without its schedule") as caught:
        save_file(trained_tensors(model), path)
    assert len(caught) == 1
    return str(caught[0].message)


def test_the_command_that_completes_a_half_file_works_as_it_stands(tmp_path):
    unet = trained_unet()
    message = save_half(unet, tmp_path / "mine.safetensors")
    assert str(tmp_path / "mine.safetensors") in message
    program, *arguments = shlex.split(message.splitlines()[-1])
    assert program == "peft-tlora"
    arguments[arguments.index("NEW")] = str(tmp_path / "whole")
    tiny_unet().save_pretrained(tmp_path / "base" / "unet")
    assert main([*arguments, "--base", str(tmp_path / "base" / "unet")]) == 0
    (file,) = (tmp_path / "whole").glob("*.safetensors")
    assert any("lora_schedule" in name for name in load_file(file))


def test_the_config_of_the_command_is_all_that_the_file_lacks(tmp_path):
    model = get_adapted()
    message = save_half(model, tmp_path / "mine.safetensors")
    given = json.loads(shlex.split(message.splitlines()[-1])[-1])
    assert given["r"] == 4
    assert given["num_train_timesteps"] == 1000.0  # the denoiser's, which no file would say
    fresh = TinyDenoiser()
    fresh.load_state_dict(
        {n.replace(".base_layer", ""): p for n, p in model.state_dict().items() if "lora" not in n}
    )
    config = TLoraConfig(**given, target_modules=["to_q"])
    load_tlora_weights(fresh, tmp_path / "mine.safetensors", "default", config=config)
    expected, found = (get_peft_model_state_dict(m) for m in (model, fresh))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def get_adapted():
    model = inject_adapter_in_model(
        TLoraConfig(r=4, min_rank=3, init_seed=9, target_modules=["to_q"]), TinyDenoiser()
    )
    perturb(model)
    return model


def test_tensors_under_the_names_of_another_format_are_named_as_such(tmp_path):
    """As VideoX-Fun writes a file for ComfyUI beside its own."""
    tensors = {
        f"lora_unet__{name.replace('.lora_A.', '.lora_down.').replace('.', '_')}": tensor
        for name, tensor in get_peft_model_state_dict(get_adapted()).items()
    }
    with pytest.warns(UserWarning, match="another format's names.*--to kohya"):
        save_file(tensors, tmp_path / "comfyui.safetensors")


def test_two_adapters_leave_the_config_to_the_user(tmp_path):
    trained_unet()
    message = save_half(get_adapted(), tmp_path / "mine.safetensors")
    assert message.endswith("--config CONFIG.json")


def test_a_whole_file_and_plain_lora_are_saved_without_a_word(tmp_path):
    unet = trained_unet()
    heard = []
    saving.listeners.append(lambda *what: heard.append(what))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_file(get_peft_model_state_dict(unet), tmp_path / "whole.safetensors")
            save_file({"to_q.lora_A.weight": unet.conv_in.weight.detach()}, tmp_path / "lora")
    finally:
        saving.listeners.pop()
    assert heard == [(str(tmp_path / "whole.safetensors"), True)]
