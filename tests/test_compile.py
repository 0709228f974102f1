"""torch.compile: nothing is compiled again for another timestep, and no graph breaks."""

import pytest
import torch
from compilations import small_unet
from torch._dynamo.testing import CompileCounter

from peft_tlora import TLoraConfig

from .conftest import perturb

STEPS = range(990, 0, -33)  # 30 of them


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def adapted():
    unet = small_unet()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    unet.add_adapter(TLoraConfig(r=8, min_rank=2, lora_alpha=4, target_modules=targets))
    perturb(unet)
    return unet


def run(unet, model, timestep):
    """The output of a compiled or plain model and the gradients of its adapter."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    e = torch.randn(2, 3, 8, generator=generator)
    unet.zero_grad()
    output = model(x, timestep, e).sample
    if torch.is_grad_enabled():
        output.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("repeated_blocks", [False, True])
def test_one_compilation_serves_all_timesteps(training, repeated_blocks):
    """Also with a timestep for each sample, and where the hook runs outside of what is compiled."""
    unet, plain = adapted(), adapted()
    counter = CompileCounter()
    if repeated_blocks:
        unet.compile_repeated_blocks(fullgraph=True, backend=counter)
        compiled = unet
    else:
        compiled = torch.compile(unet, fullgraph=True, backend=counter)
    counts = []
    with torch.set_grad_enabled(training):
        for t in STEPS:
            timestep = torch.tensor([t, 1000 - t]) if training else torch.tensor(float(t))
            found, expected = run(unet, compiled, timestep), run(plain, plain, timestep)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
            counts.append(counter.frame_count)
    assert counts == [1] * len(counts)
