"""Each denoiser class of the table, tiny: full rank at the clean end, r_min at the noisy end."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

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


def of_library(cls, library):
    """The class as if another package had defined it."""
    cls.__module__ = f"{library}.models"
    return cls


def test_an_entry_holds_only_for_a_class_with_its_argument():
    """VideoX-Fun's class has the name of diffusers' and another argument."""

    class WanTransformer3DModel(TinyDenoiser):
        def forward(self, x, ts):
            return super().forward(x, ts)

    assert describe(of_library(WanTransformer3DModel, "trainer")()) == Denoiser(argument="ts")

    class FluxTransformer2DModel(TinyDenoiser):
        def forward(self, x, timestep):
            return super().forward(x, timestep)

    assert describe(FluxTransformer2DModel()).num_train_timesteps == 1.0  # as in diffusers


def test_an_entry_holds_for_a_class_whose_decorated_forward_hides_its_arguments(monkeypatch):
    def hidden(forward):
        def wrapper(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

        return wrapper

    class Hidden(TinyDenoiser):
        forward = hidden(TinyDenoiser.forward)

    monkeypatch.setitem(DENOISERS, "Hidden", Denoiser("timestep", 1.0))
    tiny = Tiny(Hidden, lambda batch: {"x": torch.randn(batch, 3, 8)}, layers="to_q")
    assert set(active_ranks(adapted(tiny), tiny, torch.ones(B)).values()) == {1}


def test_an_entry_may_be_of_one_library_alone(monkeypatch):
    def cls():
        class Net(nn.Module):
            def forward(self, x, t):
                return x

        return Net

    monkeypatch.setitem(DENOISERS, "one:Net", Denoiser(argument="t", num_train_timesteps=1.0))
    assert describe(of_library(cls(), "one")()).num_train_timesteps == 1.0
    assert describe(of_library(cls(), "other")()).num_train_timesteps == 1000.0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("video.sigma", lambda t: SimpleNamespace(sigma=t)),
        ("video['sigma']", lambda t: {"sigma": t}),
        ("video[1]", lambda t: [t * 0, t]),
        ("video[0].sigma", lambda t: (SimpleNamespace(sigma=t),)),
    ],
)
def test_the_time_may_lie_inside_an_argument(monkeypatch, path, value):
    class Inside(TinyDenoiser):
        def forward(self, x, video):
            return super().forward(x, torch.ones(B))

    monkeypatch.setitem(DENOISERS, "Inside", Denoiser(path, 1.0))
    tiny = Tiny(Inside, lambda batch: {"x": torch.randn(batch, 3, 8)}, layers="to_q")
    model = adapted(tiny)
    x = torch.randn(2, 3, 8)
    seen = ActiveRanksOf(model)
    for t, rank in ((1.0, 1), (0.0, 4)):
        model(x, video=value(torch.full((2,), t)))
        model(x, value(torch.full((2,), t)))
        assert seen.take() == [[rank] * 2] * 2
    with pytest.warns(UserWarning, match="ran without a timestep"):
        model(x, video=None)


class ActiveRanksOf:
    """The active ranks of each call of the layer to_q."""

    def __init__(self, model):
        self.ranks = []
        layer = next(m for n, m in model.named_modules() if n.endswith("to_q"))
        layer.register_forward_hook(self.see)

    def see(self, layer, args, output):
        (variant,) = layer.lora_variant.values()
        timestep = layer.timestep_state.current()
        if timestep is not None:
            self.ranks.append(timestep.active_rank(variant.ranks.schedule).tolist())

    def take(self):
        taken, self.ranks = self.ranks, []
        return taken


class Unknown(nn.Module):
    """A class that nobody knows, of any library."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, x, timesteps):
        return self.to_q(x)


def unknown(**kwargs):
    config = TLoraConfig(r=4, min_rank=1, target_modules=["to_q"], **kwargs)
    model = inject_adapter_in_model(config, Unknown())
    perturb(model)
    return model


def test_what_is_assumed_is_said_of_a_context_in_the_denoisers_unit_too():
    model = unknown()
    with timestep_context(model, 0.5, num_train_timesteps=1.0):
        model(torch.randn(2, 3, 8), None)
    with timestep_context(model, 500), pytest.warns(UserWarning, match="doesn't know Unknown"):
        model(torch.randn(2, 3, 8), None)


def test_what_is_assumed_of_an_unknown_class_is_said_at_its_first_use():
    model, x = unknown(), torch.randn(2, 3, 8)
    words = r"doesn't know Unknown.*`timesteps` to count from 0 \(clean\) to 1000 \(pure noise\)"
    with pytest.warns(UserWarning, match=words) as caught:
        model(x, torch.tensor([700, 300]))
    assert len(caught) == 1
    model(x, torch.tensor(500))  # and no second time: any warning is an error here


@pytest.mark.parametrize(
    "given",
    [{"num_train_timesteps": 1000}, {"timestep_reversed": False}, {"timestep_type": "linear"}],
)
def test_a_config_that_says_how_timesteps_count_is_believed(given):
    unknown(**given)(torch.randn(2, 3, 8), torch.tensor([700, 300]))


TINY = Tiny(TinyDenoiser, lambda batch: {"x": torch.randn(batch, 3, 8)}, layers="to_q")


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.9, 0.3]), torch.tensor(0.01)])
def test_fractions_in_the_place_of_0_to_1000_warn(t):
    model, x = adapted(TINY), torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match="0 to 1000, but all so far lie between 0 and 1"):
        model(x, t)
    model(x, t)


def test_a_last_step_below_1_is_no_surprise():
    model, x = adapted(TINY), torch.randn(2, 3, 8)
    for t in (999.0, 500.3, 0.7, 0.3, 0.2, 0.1, 0.05, 0.01):
        model(x, torch.tensor(t))
    other = adapted(TINY)
    for t in (0, 1, torch.tensor([0, 1]), torch.tensor([0.5, 700.0])):  # whole, or not all
        other(x, t)


def test_a_part_that_hosts_run_by_itself_has_all_ranks_everywhere(monkeypatch):
    class Music(nn.Module):
        def __init__(self):
            super().__init__()
            self.lyric_encoder = nn.Sequential(nn.Linear(8, 8))
            self.to_q = nn.Linear(8, 8)

        def forward(self, x, timestep):
            return self.to_q(x + self.lyric_encoder(x))

    monkeypatch.setitem(DENOISERS, "Music", Denoiser(timeless=("lyric_encoder",)))
    tiny = Tiny(Music, lambda batch: {"x": torch.randn(batch, 8)})
    model = adapted(tiny)
    ranks = active_ranks(model, tiny, torch.full((B,), 1000.0))
    assert {name.partition(".lora")[0]: rank for name, rank in ranks.items()} == {
        "lyric_encoder.0": 4,
        "to_q": 1,
    }
    model.lyric_encoder(torch.randn(B, 8))  # any warning is an error here


def test_layers_of_a_text_encoder_inside_a_model_have_no_time_to_miss():
    class NoTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(8, 8)

        def forward(self, x):
            return self.to_q(x)

    class TextEncoder(NoTime):
        pass

    class Pipeline(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    config = TLoraConfig(r=4, min_rank=1, target_modules=["to_q"])
    inject_adapter_in_model(config, Pipeline(TextEncoder()))(torch.randn(2, 8))
    with pytest.warns(UserWarning, match="layer of Pipeline ran without a timestep"):
        inject_adapter_in_model(config, Pipeline(NoTime()))(torch.randn(2, 8))
