"""LyCORIS' files lack the frozen factors: they come back from the base, or are refused."""

import pytest
import torch
from safetensors.torch import load_file

from peft_tlora.formats.facts import TrainingFacts
from peft_tlora.formats.inspection import inspect_file
from peft_tlora.formats.own import write_diffusers, write_peft
from peft_tlora.formats.reading import read_adapter
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser

from . import foreign
from .tiny import families
from .trainers import LYCORIS_FACTS as FACTS
from .trainers import lycoris as trained


def largest_error(found, expected, active=3):
    """Of the updates at a mask, relative to the largest entry."""
    return max(
        (
            (found.layers[name].delta(active) - layer.delta(active)).abs().max()
            / layer.delta(active).abs().max()
        ).item()
        for name, layer in expected.layers.items()
    )


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
@pytest.mark.parametrize("sig_type", ["principal", "last"])
def test_the_frozen_factors_come_back_from_the_weights_of_the_base(tmp_path, sig_type, prefix):
    path, adapter, base = trained(tmp_path, sig_type=sig_type, prefix=prefix)
    found = read_adapter(
        path, base=base, facts=TrainingFacts(**{**vars(FACTS), "sig_type": sig_type})
    )
    assert found.layers.keys() == adapter.layers.keys()
    assert largest_error(found, adapter) < 1e-4
    assert "agree with the trained ones to 1.000" not in found.notes[0]
    assert "agree with the trained ones to 0.9" in found.notes[0]
    again = read_adapter(write_diffusers(read_adapter(write_peft(found, tmp_path / "p")), tmp_path))
    families.assert_equal(again, found)


def test_the_signs_of_the_recomputed_triplets_are_those_of_the_trained_ones(tmp_path):
    path, adapter, base = trained(tmp_path)
    tensors = load_file(path)
    for name, tensor in tensors.items():  # as another library's SVD might have had them
        if name.endswith("q_layer.weight"):
            tensor[1::2] *= -1
        elif name.endswith("p_layer.weight"):
            tensor[:, 1::2] *= -1
    found = read_adapter(foreign.save(path, tensors), base=base, facts=FACTS)
    assert largest_error(found, adapter) < 1e-4
    for layer in found.layers.values():
        q, p, _, q0, p0, _ = foreign.factors_of(layer)
        assert ((q * q0).sum(1) > 0).all()
        assert ((p * p0).sum(0) > 0).all()


def test_weights_rounded_to_bfloat16_after_the_training_give_an_error_of_their_own(tmp_path):
    path, adapter, base = trained(tmp_path)
    rounded = read_adapter(path, base=base.bfloat16(), facts=FACTS)
    assert 0.01 < largest_error(rounded, adapter)


@pytest.mark.parametrize(
    "change",
    [
        lambda path, base: (base, {"sig_type": "last"}),
        lambda path, base: (families.model("sd3", seed=1), {}),
    ],
    ids=["another sig_type", "another base"],
)
def test_factors_that_started_somewhere_else_raises(tmp_path, change):
    path, _, base = trained(tmp_path)
    base, facts = change(path, base)
    with pytest.raises(ValueError, match=r"agree to 0\.\d\d only with the recomputed start"):
        read_adapter(path, base=base, facts=TrainingFacts(**{**vars(FACTS), **facts}))


def test_a_timestep_of_pure_noise_that_the_base_never_sees_raises(tmp_path):
    """1000 steps of training are 1 for FLUX's forward; with 1000 no rank would ever be masked."""
    path, _, base = trained(tmp_path, "flux", num_train_timesteps=1)
    with pytest.raises(ValueError, match=r"=1000 is not in the unit of Flux.*: pass 1 "):
        read_adapter(path, base=base, facts=FACTS)
    report = inspect_file(path, base=base, facts=TrainingFacts(sig_type="principal"))
    assert report["schedule"] is None
    assert report["ranks"] == {4: 7}


def test_a_base_that_counts_its_time_backwards_gets_such_a_schedule(tmp_path, monkeypatch):
    path, _, base = trained(tmp_path)
    monkeypatch.setitem(DENOISERS, type(base).__name__, Denoiser(timestep_reversed=True))
    layers = read_adapter(path, base=base, facts=FACTS).layers.values()
    assert {layer.schedule.active_rank(0) for layer in layers} == {2}


def test_a_random_start_is_lost_raises(tmp_path):
    path, _, base = trained(tmp_path, random=True)
    with pytest.raises(ValueError, match="use_data_init=False, whose start is lost"):
        read_adapter(path, base=base, facts=FACTS)


@pytest.mark.parametrize("kind", ["int8", "meta"])
def test_a_base_without_its_own_weights_raises(tmp_path, kind):
    path, _, base = trained(tmp_path)
    if kind == "meta":
        base = base.to("meta")
    else:
        for module in base.modules():
            if isinstance(module, torch.nn.Linear):
                weight = torch.zeros(module.weight.shape, dtype=torch.int8)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="not quantised and not left out"):
        read_adapter(path, base=base, facts=FACTS)


def test_the_sig_type_is_asked_for_raises(tmp_path):
    path, _, base = trained(tmp_path)
    with pytest.raises(ValueError, match="LyCORIS doesn't say sig_type"):
        read_adapter(path, base=base, facts=TrainingFacts(min_rank=2))


def test_a_convolution_with_a_kernel_raises(tmp_path):
    adapter = families.adapter("sd", ["conv1"])
    tensors = foreign.lycoris(adapter)
    for name, tensor in tensors.items():
        if name.endswith("q_layer.weight"):
            tensors[name] = tensor[:, :, :1, :1]
    path = foreign.save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"convolution with a kernel of \(3, 3\)"):
        read_adapter(path, base=families.model("sd"), facts=FACTS)
