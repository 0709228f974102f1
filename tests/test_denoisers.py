"""Each denoiser class of the table, tiny: full rank at the clean end, r_min at the noisy end."""

import diffusers
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_tlora import TLoraConfig
from peft_tlora.denoisers import DENOISERS, Denoiser, describe

from .conftest import TinyDenoiser, perturb, tiny_unet

B = 2


def unet():
    def call(model, t):
        return model(torch.randn(B, 4, 8, 8), t, torch.randn(B, 3, 16)).sample

    return tiny_unet(), call


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )

    def call(model, t):
        return model(
            hidden_states=torch.randn(B, 4, 8, 8),
            encoder_hidden_states=torch.randn(B, 3, 16),
            pooled_projections=torch.randn(B, 16),
            timestep=t,
        ).sample

    return model, call


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )

    def call(model, t):
        return model(
            hidden_states=torch.randn(B, 6, 4),
            encoder_hidden_states=torch.randn(B, 3, 16),
            pooled_projections=torch.randn(B, 16),
            timestep=t,
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample

    return model, call


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )

    def call(model, t):
        return model(
            hidden_states=torch.randn(B, 4, 16),
            encoder_hidden_states=torch.randn(B, 3, 16),
            encoder_hidden_states_mask=torch.ones(B, 3, dtype=torch.bool),
            timestep=t,
            img_shapes=[(1, 2, 2)] * B,
        ).sample

    return model, call


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )

    def call(model, t):
        return model(
            hidden_states=torch.randn(B, 4, 2, 4, 4),
            timestep=t,
            encoder_hidden_states=torch.randn(B, 3, 16),
        ).sample

    return model, call


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )

    def call(model, t):
        return model(
            hidden_states=torch.randn(B, 4, 8, 8),
            timestep=t,
            encoder_hidden_states=torch.randn(B, 3, 16),
            encoder_attention_mask=torch.ones(B, 3, dtype=torch.bool),
        ).sample

    return model, call


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 32, 32],
    )
    # it leaves its padding tokens uninitialised
    nn.init.zeros_(model.x_pad_token)
    nn.init.zeros_(model.cap_pad_token)

    def call(model, t):
        latents = [torch.randn(4, 1, 8, 8) for _ in range(B)]
        return torch.stack(model(latents, t, [torch.randn(3, 16) for _ in range(B)]).sample)

    return model, call


MODELS = {
    "UNet2DConditionModel": (unet, 1000.0, 0.0),
    "SD3Transformer2DModel": (sd3, 1000.0, 0.0),
    "FluxTransformer2DModel": (flux, 1.0, 0.0),
    "QwenImageTransformer2DModel": (qwen_image, 1.0, 0.0),
    "WanTransformer3DModel": (wan, 1000.0, 0.0),
    "Lumina2Transformer2DModel": (lumina2, 0.0, 1.0),
    "ZImageTransformer2DModel": (z_image, 0.0, 1.0),
}
ATTENTION = r".*\.(attn\d?|attention)\.(to_q|to_k|to_v|to_out\.0)"


def adapted(make, **kwargs):
    torch.manual_seed(0)
    model, call = make()
    config = TLoraConfig(r=4, min_rank=1, target_modules=ATTENTION, init_seed=0, **kwargs)
    model.requires_grad_(False)
    model.add_adapter(config)
    perturb(model)
    return model, call


def active_ranks(model, call, t):
    model.zero_grad()
    torch.manual_seed(1)
    call(model, t).square().sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_lambda" in name and parameter.grad is not None
    }
    return {name: int((gradient != 0).sum()) for name, gradient in gradients.items()}


def test_every_class_of_the_table_is_tested():
    assert set(MODELS) == set(DENOISERS)


@pytest.mark.parametrize("name", MODELS)
def test_the_rank_at_the_noisy_and_the_clean_end(name):
    make, noisy, clean = MODELS[name]
    model, call = adapted(make)
    assert type(model).__name__ == name
    for value, rank in ((noisy, 1), (clean, 4), ((noisy + clean) / 2, 2)):
        seen = active_ranks(model, call, torch.full((B,), value))
        # a block whose output is dropped (the last text stream) gets no gradient at all
        assert set(seen.values()) - {0} == {rank}, f"t={value}: {seen}"
        assert sum(found > 0 for found in seen.values()) >= len(seen) / 2


@pytest.mark.parametrize("name", MODELS)
def test_each_sample_has_its_own_mask(name):
    make, noisy, clean = MODELS[name]
    model, call = adapted(make)
    values = {"noisy": noisy, "clean": clean}
    with torch.no_grad():
        outputs = {}
        for key in ("noisy", "clean", "mixed"):
            torch.manual_seed(1)
            t = [noisy, clean] if key == "mixed" else [values[key]] * B
            outputs[key] = call(model, torch.tensor(t))
    torch.testing.assert_close(outputs["mixed"][0], outputs["noisy"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["mixed"][1], outputs["clean"][1], atol=1e-5, rtol=1e-4)


def test_wan_with_a_timestep_for_each_token_uses_the_noisiest():
    model, _ = adapted(wan)

    def call(model, t):
        return model(torch.randn(B, 4, 2, 4, 4), t, torch.randn(B, 3, 16)).sample

    t = torch.full((B, 8), 1000.0)
    t[:, :4] = 0.0  # the first frame is given
    seen = active_ranks(model, call, t)
    cross = {rank for name, rank in seen.items() if "attn2.to_k" in name}
    own = {rank for name, rank in seen.items() if "attn1.to_q" in name}
    assert cross == {1}  # the text's axis isn't the video's
    assert own == {4}  # clean tokens train all ranks


def test_z_images_packed_embedder_takes_one_timestep_only():
    torch.manual_seed(0)
    model, call = z_image()
    model.add_adapter(TLoraConfig(r=4, target_modules=r"all_x_embedder\.2-1"))
    with torch.no_grad():
        call(model, torch.tensor([0.3, 0.3]))
        with pytest.raises(ValueError, match=r"all_x_embedder\.2-1 can't tell"):
            call(model, torch.tensor([0.3, 0.4]))


def test_the_config_wins_over_the_table():
    make, _, _ = MODELS["FluxTransformer2DModel"]
    model, call = adapted(make, num_train_timesteps=2.0, timestep_reversed=True)
    assert set(active_ranks(model, call, torch.zeros(B)).values()) - {0} == {1}
    assert set(active_ranks(model, call, torch.full((B,), 2.0)).values()) - {0} == {4}


def test_an_unknown_class_counts_to_1000_and_a_subclass_as_its_parent(denoiser):
    assert describe(TinyDenoiser) == Denoiser("timestep", 1000.0, False)

    class OwnFlux(diffusers.FluxTransformer2DModel):
        pass

    assert describe(OwnFlux) == DENOISERS["FluxTransformer2DModel"]


def test_a_user_can_tell_how_a_class_takes_its_timestep(monkeypatch):
    class Sigma(TinyDenoiser):
        def forward(self, x, sigma_fraction):
            return super().forward(x, sigma_fraction)

    model = Sigma()
    assert describe(Sigma) is None
    monkeypatch.setitem(DENOISERS, "Sigma", Denoiser("sigma_fraction", 1.0))
    model = get_peft_model(model, TLoraConfig(r=4, min_rank=1, target_modules=["to_q"]))
    perturb(model)

    def call(model, t):
        return model(torch.randn(B, 3, 8), t)

    assert set(active_ranks(model, call, torch.ones(B)).values()) == {1}
    assert set(active_ranks(model, call, torch.zeros(B)).values()) == {4}


def test_inner_blocks_and_models_of_another_time_are_no_denoisers():
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from transformers import DecisionTransformerModel

    for cls in (Transformer2DModel, DecisionTransformerModel, nn.Linear, diffusers.AutoencoderKL):
        assert describe(cls) is None


def test_a_known_denoiser_inside_a_training_wrapper_is_the_one_that_is_read():
    class Wrapper(nn.Module):
        def __init__(self, transformer):
            super().__init__()
            self.transformer = transformer

        def forward(self, x, t):  # counts to 1000, as the scheduler does
            return self.transformer(
                hidden_states=x,
                encoder_hidden_states=torch.zeros(B, 3, 16),
                pooled_projections=torch.zeros(B, 16),
                timestep=t / 1000,
                img_ids=torch.zeros(6, 3),
                txt_ids=torch.zeros(3, 3),
            ).sample

    model = get_peft_model(
        Wrapper(flux()[0]), TLoraConfig(r=4, min_rank=1, target_modules=ATTENTION)
    )
    perturb(model)

    def call(model, t):
        return model(torch.randn(B, 6, 4), t)

    assert set(active_ranks(model, call, torch.full((B,), 1000.0)).values()) - {0} == {1}
    assert set(active_ranks(model, call, torch.zeros(B)).values()) - {0} == {4}
