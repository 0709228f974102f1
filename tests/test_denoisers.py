"""Each denoiser class of the table, tiny: full rank at the clean end, r_min at the noisy end."""

from collections.abc import Mapping
from functools import partial

import diffusers
import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from peft_tlora import TLoraConfig, timestep_context
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser, describe

from .conftest import TinyDenoiser, perturb
from .tiny import Tiny, controlnets, image, installed, unets, video_audio

B = 2
ALL_MODELS = controlnets.MODELS | image.MODELS | unets.MODELS | video_audio.MODELS
MODELS = installed(ALL_MODELS)
UNTESTED = {"CosmosControlNetModel": "its forward needs torchvision"}
ATTENTION = r".*\.(attn\d?|attention)\.(to_q|to_k|to_v|to_out\.0)"


def adapted(tiny: Tiny, **kwargs):
    torch.manual_seed(0)
    model = tiny.make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # gates and output layers that start at zero stop all gradients
            nn.init.normal_(parameter, std=0.1)
    options = {
        "r": 4,
        "min_rank": 1,
        "target_modules": tiny.layers or linear_layers(model),
        "exclude_modules": tiny.exclude,
        "init_seed": 1,
    }
    inject_adapter_in_model(TLoraConfig(**{**options, **kwargs}), model)
    perturb(model)
    return model


def linear_layers(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def call(model, tiny: Tiny, t):
    """All tensors that a forward returns, each with the batch in front."""
    torch.manual_seed(1)
    timestep = {describe(model).argument: t} if tiny.timestep is None else tiny.timestep(t)
    return tensors(model(**tiny.inputs(len(t)), **timestep))


def tensors(output):
    if output is None:
        return []
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, list):  # one for each sample
        return [torch.stack(output)]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in tensors(part)]


def active_ranks(model, tiny, t):
    model.zero_grad()
    sum(tensor.square().sum() for tensor in call(model, tiny, t)).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_lambda" in name and parameter.grad is not None
    }
    return {name: int((gradient != 0).sum()) for name, gradient in gradients.items()}


def ends(denoiser: Denoiser) -> tuple[float, float, float]:
    """The timesteps of pure noise, halfway and clean."""
    if denoiser.timestep_type == "log_sigma":
        return 4.0, 0.0, -4.0
    T = denoiser.num_train_timesteps
    return (0.0, T / 2, T) if denoiser.timestep_reversed else (T, T / 2, 0.0)


def test_every_class_of_the_table_is_tested():
    of_diffusers = {name for name in DENOISERS if ":" not in name}
    assert set(ALL_MODELS) | {"UVit2DModel"} == of_diffusers - set(UNTESTED)


@pytest.mark.parametrize("name", MODELS)
def test_the_rank_at_the_noisy_and_the_clean_end(name):
    tiny = MODELS[name]
    model = adapted(tiny)
    assert type(model).__name__ == name
    for value, rank in zip(ends(describe(model)), (1, 2, 4), strict=True):
        seen = active_ranks(model, tiny, torch.full((B,), value))
        # a block whose output is dropped (the last text stream) gets no gradient at all
        assert set(seen.values()) - {0} == {rank}, f"t={value}: {seen}"
        assert sum(found > 0 for found in seen.values()) >= len(seen) / 2


# of the largest output; on some CPUs one rounding of this model's weights alone moves it by 5e-4
ROUNDING = {"SanaWMTransformer3DModel": 2e-3}


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.own_masks])
def test_each_sample_has_its_own_mask(name):
    tiny = MODELS[name]
    model = adapted(tiny)
    noisy, _, clean = ends(describe(model))
    with torch.no_grad():
        mixed = call(model, tiny, torch.tensor([noisy, clean]))
        all_noisy = call(model, tiny, torch.full((B,), noisy))
        all_clean = call(model, tiny, torch.full((B,), clean))
    assert (all_noisy[0] - all_clean[0]).abs().max() > 0.01 * all_clean[0].abs().max()
    for together, first, second in zip(mixed, all_noisy, all_clean, strict=True):
        assert len(together) == B
        rounding = ROUNDING.get(name, 1e-4) * together.abs().max().item()
        torch.testing.assert_close(together[0], first[0], atol=rounding, rtol=0)
        torch.testing.assert_close(together[1], second[1], atol=rounding, rtol=0)


def test_a_model_without_time_takes_its_timestep_from_the_context():
    tiny = Tiny(unets.uvit, unets.uvit_inputs, timestep=lambda t: {})
    model = adapted(tiny)
    for value, rank in ((1000, 1), (500, 2), (0, 4)):
        with timestep_context(model, value):
            assert set(active_ranks(model, tiny, torch.zeros(B)).values()) - {0} == {rank}
    with pytest.warns(UserWarning, match="UVit2DModel ran without a timestep"):
        call(model, tiny, torch.zeros(B))


def test_wan_with_a_timestep_for_each_token_uses_the_noisiest():
    tiny = MODELS["WanTransformer3DModel"]
    model = adapted(tiny, target_modules=ATTENTION)
    t = torch.full((B, 8), 1000.0)
    t[:, :4] = 0.0  # the first frame is given
    seen = active_ranks(model, tiny, t)
    cross = {rank for name, rank in seen.items() if "attn2.to_k" in name}
    own = {rank for name, rank in seen.items() if "attn1.to_q" in name}
    assert cross == {1}  # the text's axis isn't the video's
    assert own == {4}  # clean tokens train all ranks


MIXING = {"z_image": (image.z_image, image.z_image_inputs, r"all_x_embedder\.2-1")}
if image.QWEN_HAS_ZERO_COND_T:
    doubled = partial(image.qwen_image, zero_cond_t=True)
    MIXING["qwen_image"] = (doubled, image.qwen_image_inputs, r".*\.img_mod\.1")


@pytest.mark.parametrize(("make", "inputs", "layer"), MIXING.values(), ids=MIXING)
def test_layers_that_mix_the_samples_take_one_timestep_only(make, inputs, layer):
    tiny = Tiny(make, inputs, layers=layer)
    model = adapted(tiny)
    with torch.no_grad():
        call(model, tiny, torch.tensor([0.3, 0.3]))
        with pytest.raises(ValueError, match="needs one timestep for the whole batch"):
            call(model, tiny, torch.tensor([0.3, 0.4]))


def test_the_config_wins_over_the_table():
    tiny = MODELS["FluxTransformer2DModel"]
    model = adapted(tiny, num_train_timesteps=2.0, timestep_reversed=True)
    assert set(active_ranks(model, tiny, torch.zeros(B)).values()) - {0} == {1}
    assert set(active_ranks(model, tiny, torch.full((B,), 2.0)).values()) - {0} == {4}


def test_an_unknown_class_counts_to_1000_and_a_subclass_as_its_parent():
    class OwnFlux(diffusers.FluxTransformer2DModel):
        pass

    assert describe(TinyDenoiser()) == Denoiser("timestep", 1000.0, False)
    assert (
        describe(OwnFlux(num_layers=0, num_single_layers=0)) == DENOISERS[OwnFlux.__base__.__name__]
    )


def test_a_new_class_of_diffusers_counts_to_1000_with_a_warning(monkeypatch):
    monkeypatch.delitem(DENOISERS, "FluxTransformer2DModel")
    tiny = MODELS["FluxTransformer2DModel"]
    model = adapted(tiny)
    with pytest.warns(UserWarning, match="doesn't know FluxTransformer2DModel.*0.*to 1000"):
        ranks = active_ranks(model, tiny, torch.full((B,), 1000.0))
    assert set(ranks.values()) - {0} == {1}


def test_a_user_can_tell_how_a_class_takes_its_timestep(monkeypatch):
    class Sigma(TinyDenoiser):
        def forward(self, x, sigma_fraction):
            return super().forward(x, sigma_fraction)

    assert describe(Sigma()) is None
    monkeypatch.setitem(DENOISERS, "Sigma", Denoiser("sigma_fraction", 1.0))
    tiny = Tiny(Sigma, lambda batch: {"x": torch.randn(batch, 3, 8)}, layers="to_q")
    model = adapted(tiny)
    assert set(active_ranks(model, tiny, torch.ones(B)).values()) == {1}
    assert set(active_ranks(model, tiny, torch.zeros(B)).values()) == {4}


def test_inner_blocks_and_models_of_another_time_are_no_denoisers():
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    temporal = TransformerTemporalModel(1, 8, 8, norm_num_groups=4)
    other = DecisionTransformerModel(DecisionTransformerConfig(hidden_size=8, n_head=1, n_layer=1))
    for module in (temporal, other, nn.Linear(2, 2)):
        assert describe(module) is None


@pytest.mark.parametrize("argument", ["t", "timestep"])
def test_a_known_denoiser_inside_a_training_wrapper_is_the_one_that_is_read(argument):
    inputs = MODELS["FluxTransformer2DModel"].inputs

    class Wrapper(nn.Module):  # counts to 1000, as the scheduler does
        def __init__(self):
            super().__init__()
            self.transformer = image.flux()

        def forward(self, t, **kwargs):
            return self.transformer(timestep=t / 1000, **kwargs)

    class TimestepWrapper(Wrapper):
        def forward(self, timestep, **kwargs):
            return super().forward(timestep, **kwargs)

    make = Wrapper if argument == "t" else TimestepWrapper
    tiny = Tiny(make, inputs, timestep=lambda t: {argument: t}, layers=ATTENTION)
    model = adapted(tiny)
    assert set(active_ranks(model, tiny, torch.full((B,), 1000.0)).values()) - {0} == {1}
    assert set(active_ranks(model, tiny, torch.zeros(B)).values()) - {0} == {4}
