"""The protocol for real models, on tiny random ones with tiny random CLIP and DINO."""

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from evidence import store, training
from evidence.arms import CORE
from evidence.plan import Plan
from PIL import Image
from real_models import concepts as pictures
from real_models import families, protocol
from real_models.judge import Judge
from toybox.model import build_tokenizer
from toybox.scenes import Scene, render

SIZE = 32
PLAN = Plan(arms=CORE, ranks=(4,), shares=(0.5,), rates=(1.0,), seeds=1, steps=(1, 2), bands=False)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def text_config(tokenizer):
    return {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16,
        "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def ready(pipeline, dtype):
    """In evaluation mode, as ``from_pretrained`` leaves it."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().to(dtype)
    return pipeline


def tiny_sdxl(tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**text_config(tokenizer))
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=SIZE,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=transformers.CLIPTextModel(config),
        text_encoder_2=transformers.CLIPTextModelWithProjection(config),
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    return ready(pipeline, dtype)


def tiny_flux(tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    words = text_config(tokenizer)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=SIZE,
        scaling_factor=0.36, shift_factor=0.12,
    )  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    pipeline = diffusers.FluxPipeline(
        vae=vae, transformer=transformer, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**words)),
        text_encoder_2=transformers.T5EncoderModel(t5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    return ready(pipeline, dtype)


TINY = {"sdxl": tiny_sdxl, "flux": tiny_flux}


@pytest.fixture(scope="module")
def judge(tokenizer):
    torch.manual_seed(1)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}  # fmt: skip
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text_config(tokenizer),
            vision_config=vision | {"projection_dim": 16},
            projection_dim=16,
        )
    )
    size = {"height": SIZE, "width": SIZE}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    processor = transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    dino = transformers.ViTModel(transformers.ViTConfig(**vision), add_pooling_layer=False)
    return Judge(clip, processor, dino, transformers.ViTImageProcessorPil(size=size))


@pytest.fixture
def concepts(tmp_path):
    for name, colour in (("cup", "red"), ("dog", "green")):
        folder = tmp_path / "concepts" / name
        folder.mkdir(parents=True)
        render(Scene("star", colour, "blue", "dotted", "center")).save(folder / "image.png")
        (folder / "class.txt").write_text("toy\n")
    Image.new("L", (64, 64)).save(folder / "mask.png")
    return pictures.load_concepts(tmp_path / "concepts", SIZE)


def test_concepts_are_read_with_their_masks(concepts, tmp_path):
    assert [(c.name, c.noun, c.image.size) for c in concepts] == [
        ("cup", "toy", (SIZE, SIZE)), ("dog", "toy", (SIZE, SIZE))
    ]  # fmt: skip
    assert concepts[0].masked is concepts[0].image
    assert concepts[1].masked.getextrema() == ((255, 255),) * 3
    with pytest.raises(ValueError, match="make a folder for each concept"):
        pictures.load_concepts(tmp_path / "nothing", SIZE)


@pytest.fixture
def _quick(monkeypatch):
    for family in families.FAMILIES.values():
        monkeypatch.setitem(family.sampling, "num_inference_steps", 2)
    monkeypatch.setattr(protocol, "CONTEXTS", protocol.CONTEXTS[:1])
    monkeypatch.setattr(protocol, "UNRELATED", protocol.UNRELATED[:1])


# numpy 2's complaint about an array of diffusers' Euler scheduler
euler = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


every_family = pytest.mark.parametrize("name", TINY)


@euler
@every_family
@pytest.mark.usefixtures("_quick")
def test_every_arm_runs_and_a_second_run_goes_on(name, tokenizer, judge, concepts, tmp_path):
    made = []

    def make_pipeline():
        made.append(1)
        return TINY[name](tokenizer)

    given = (PLAN, concepts[:1], families.FAMILIES[name], make_pipeline, judge, tmp_path)
    text = protocol.benchmark(*given)
    records = store.load(tmp_path / "results.jsonl")
    assert len(records) == (1 + 2 * len(CORE))
    assert len(made) == 1 + len(CORE)
    base = [record for record in records if record["arm"] == "base"]
    assert all(record["drift"] == pytest.approx(0, abs=1e-5) for record in base)
    assert all(r["drift"] > 0 for r in records if r["arm"] != "base" and r["step"] == 2)
    assert "T-LoRA, r=4, r_min=2 - LoRA r, r=4" in text
    assert protocol.benchmark(*given) == text
    assert len(made) == 1 + len(CORE)


def one_cell(concepts, arm, steps=PLAN.steps):
    (cell,) = [c for c in protocol.cells(replace(PLAN, arms=(arm,)), concepts[:1]) if c.r]
    return replace(cell, steps=steps)


@euler
@every_family
@pytest.mark.usefixtures("_quick")
def test_adapters_of_a_bfloat16_model_are_trained_in_float32(
    name, tokenizer, judge, concepts, monkeypatch
):
    kept = []

    def attach(denoiser, arm, **options):
        kept.append(denoiser)
        training.attach(denoiser, arm, **options)

    monkeypatch.setattr(protocol, "attach", attach)
    cell, family = one_cell(concepts, "tlora"), families.FAMILIES[name]
    made = TINY[name](tokenizer, torch.bfloat16)
    records = list(protocol.run(cell, concepts[0], family, lambda: made, judge))
    assert [step for step, _ in records] == [1, 2]
    trained = {p.dtype for p in kept[0].parameters() if p.requires_grad}
    frozen = {p.dtype for n, p in kept[0].named_parameters() if "lora" not in n}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def test_judge_tells_the_same_picture_from_another(judge):
    scenes = [render(Scene("star", c, "blue", "dotted", "center")) for c in ("red", "white")]
    for features in (judge.clip_images(scenes), judge.dino_images(scenes)):
        likeness = features @ features.T
        assert likeness.diagonal().tolist() == pytest.approx([1, 1], abs=1e-5)
        assert likeness[0, 1] < 1 - 1e-4
    assert judge.clip_texts(["a", "a dog"]).shape == (2, 16)


@euler
@every_family
@pytest.mark.usefixtures("_quick")
def test_the_denoiser_is_trained_with_what_its_pipeline_samples_it_with(name, tokenizer, concepts):
    family, pipeline, calls = families.FAMILIES[name], TINY[name](tokenizer), []
    denoiser = getattr(pipeline, family.denoiser)

    def watch(module, args, kwargs):
        calls.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    prompt = protocol.caption(concepts[0])
    unguided = {"guidance_scale": 1.0} if name == "sdxl" else {}
    pipeline(
        prompt, height=SIZE, width=SIZE, output_type="latent", **{**family.sampling, **unguided}
    )
    sampled = calls[0]
    clean, conditions, noising = family.prepare(pipeline, concepts[0].image, prompt)
    _, timestep, _ = noising(clean, torch.randn_like(clean), torch.tensor([700]))
    expected = {**sampled, **(sampled.get("added_cond_kwargs") or {})}
    for key, value in {**conditions, **conditions.get("added_cond_kwargs", {})}.items():
        if key != "added_cond_kwargs":
            assert torch.equal(value, expected[key]), key
    (inputs,) = (sampled[key] for key in ("sample", "hidden_states") if key in sampled)
    assert (clean.shape, clean.dtype) == (inputs.shape, inputs.dtype)
    # in the pipeline's unit: a share of the noise for FLUX, of 1000 for SDXL
    assert (timestep.item() <= 1) == (sampled["timestep"].max().item() <= 1)


@pytest.mark.parametrize("name", TINY)
def test_latents_are_what_the_pipeline_decodes(name, tokenizer, concepts):
    pipeline, vae = TINY[name](tokenizer), TINY[name](tokenizer).vae
    latents = families.encode(pipeline, concepts[0].image)
    pixels = pipeline.image_processor.preprocess(concepts[0].image)
    undone = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    with torch.no_grad():
        torch.testing.assert_close(undone, vae.encode(pixels).latent_dist.mean)


def test_patches_of_flux_are_its_pipelines(tokenizer, concepts):
    pipeline = tiny_flux(tokenizer)
    latents = families.encode(pipeline, concepts[0].image)
    clean, *_ = families.prepare_flux(pipeline, concepts[0].image, "a toy")
    assert torch.equal(clean, pipeline._pack_latents(latents, *latents.shape))
    decoded = pipeline._unpack_latents(clean, SIZE, SIZE, pipeline.vae_scale_factor)
    assert torch.equal(decoded, latents)


def test_flow_matching_leads_from_noise_to_the_picture():
    clean, noise = torch.randn(2, 3, 5, 4)
    noisy, share, velocity = families.flow_matching(clean, noise, torch.tensor([0, 499, 999]))
    assert share.tolist() == pytest.approx([0.001, 0.5, 1.0])
    torch.testing.assert_close(noisy - share.view(-1, 1, 1) * velocity, clean)
    torch.testing.assert_close(noisy[2], noise[2])


@euler
@pytest.mark.usefixtures("_quick")
def test_training_adds_noise_as_the_model_was_trained_not_as_euler_samples(
    tokenizer, judge, concepts, monkeypatch
):
    inputs = []

    def watched_fit(unet, *args, **options):
        watch = unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        yield from training.fit(unet, *args, **options)
        watch.remove()

    monkeypatch.setattr(protocol, "fit", watched_fit)
    cell, family = one_cell(concepts, "lora", (10,)), families.FAMILIES["sdxl"]
    list(protocol.run(cell, concepts[0], family, lambda: tiny_sdxl(tokenizer), judge))
    levels = [x.std() for x in inputs[:10]]
    assert max(levels) < 3  # Euler's noise is up to 14.6 deviations,
    assert max(levels) - min(levels) > 0.3  # or none at all once it has sampled
