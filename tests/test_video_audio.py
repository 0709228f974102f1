"""Pipelines of video and audio: train, save, load and generate with the mask of each timestep."""

import peft
import pytest
import torch

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.timestep.denoisers import describe

from .conftest import Watch, assert_masks_follow
from .tiny.pipelines import denoiser, save_weights
from .tiny.video_pipelines import PIPELINES

B = 2


def adapted(model):
    """The model, or PEFT's wrapper if diffusers gives it no methods for adapters."""
    targets = ["to_v", "to_out.0"]  # half of the projections, for speed
    config = TLoraConfig(r=4, min_rank=1, init_seed=0, target_modules=targets)
    if not hasattr(model, "add_adapter"):
        return peft.get_peft_model(model, config)
    model.add_adapter(config)
    return model


def train(model, inputs, max_timestep, steps=2):
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.0)
    for _ in range(steps):
        output = model(**inputs(B), timestep=torch.rand(B) * max_timestep)[0]
        (output - torch.randn_like(output)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weights
    assert not any(map(torch.equal, weights, before))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_trained_adapter_is_saved_and_loaded_and_follows_the_timesteps(name, tmp_path):
    tiny = PIPELINES[name]
    pipeline, loaded = tiny.make(), tiny.make()
    assert type(pipeline).__name__ == name
    base = tiny.generate(pipeline)
    model = adapted(denoiser(pipeline))
    train(model, tiny.inputs, describe(denoiser(pipeline)).num_train_timesteps)
    trained = tiny.generate(pipeline)
    with timestep_context(denoiser(pipeline), 0.0):
        full_rank = tiny.generate(pipeline)
    assert not torch.allclose(trained, base, atol=1e-2)
    assert not torch.allclose(trained, full_rank, atol=1e-2)
    if hasattr(pipeline, "save_lora_weights"):
        save_weights(pipeline, tmp_path)
        loaded.load_lora_weights(str(tmp_path), adapter_name="toy")
    else:
        model.save_pretrained(tmp_path)
        peft.PeftModel.from_pretrained(denoiser(loaded), tmp_path, adapter_name="toy")
    watch = Watch(denoiser(loaded))
    assert torch.equal(tiny.generate(loaded), trained)
    assert_masks_follow(watch, loaded.scheduler, tiny.calls)
