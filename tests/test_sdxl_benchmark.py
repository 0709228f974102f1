"""The SDXL protocol, on a tiny random SDXL with tiny random CLIP and DINO."""

from dataclasses import replace

import diffusers
import pytest
import sdxl_single_image as sdxl
import torch
import transformers
from evidence import store, training
from evidence.arms import CORE
from evidence.plan import Plan
from PIL import Image
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
    return diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=transformers.CLIPTextModel(config),
        text_encoder_2=transformers.CLIPTextModelWithProjection(config),
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    ).to(dtype)  # fmt: skip


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
    return sdxl.Judge(clip, processor, dino, transformers.ViTImageProcessorPil(size=size))


@pytest.fixture
def concepts(tmp_path):
    for name, colour in (("cup", "red"), ("dog", "green")):
        folder = tmp_path / "concepts" / name
        folder.mkdir(parents=True)
        render(Scene("star", colour, "blue", "dotted", "center")).save(folder / "image.png")
        (folder / "class.txt").write_text("toy\n")
    Image.new("L", (64, 64)).save(folder / "mask.png")
    return sdxl.load_concepts(tmp_path / "concepts", SIZE)


def test_concepts_are_read_with_their_masks(concepts, tmp_path):
    assert [(c.name, c.noun, c.image.size) for c in concepts] == [
        ("cup", "toy", (SIZE, SIZE)), ("dog", "toy", (SIZE, SIZE))
    ]  # fmt: skip
    assert concepts[0].masked is concepts[0].image
    assert concepts[1].masked.getextrema() == ((255, 255),) * 3
    with pytest.raises(ValueError, match="make a folder for each concept"):
        sdxl.load_concepts(tmp_path / "nothing", SIZE)


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setitem(sdxl.SAMPLING, "num_inference_steps", 2)
    monkeypatch.setattr(sdxl, "CONTEXTS", sdxl.CONTEXTS[:1])
    monkeypatch.setattr(sdxl, "UNRELATED", sdxl.UNRELATED[:1])


# numpy 2's complaint about an array of diffusers' Euler scheduler
euler = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@euler
@pytest.mark.usefixtures("_quick")
def test_every_arm_runs_and_a_second_run_goes_on(tokenizer, judge, concepts, tmp_path):
    made = []

    def make_pipeline():
        made.append(1)
        return tiny_sdxl(tokenizer)

    text = sdxl.benchmark(PLAN, concepts[:1], make_pipeline, judge, tmp_path)
    records = store.load(tmp_path / "results.jsonl")
    assert len(records) == (1 + 2 * len(CORE))
    assert len(made) == 1 + len(CORE)
    base = [record for record in records if record["arm"] == "base"]
    assert all(record["drift"] == pytest.approx(0, abs=1e-5) for record in base)
    assert all(r["drift"] > 0 for r in records if r["arm"] != "base" and r["step"] == 2)
    assert "T-LoRA, r=4, r_min=2 - LoRA r, r=4" in text
    assert sdxl.benchmark(PLAN, concepts[:1], make_pipeline, judge, tmp_path) == text
    assert len(made) == 1 + len(CORE)


@euler
@pytest.mark.usefixtures("_quick")
def test_adapters_of_a_bfloat16_model_are_trained_in_float32(
    tokenizer, judge, concepts, monkeypatch
):
    kept = []

    def attach(unet, arm, **options):
        kept.append(unet)
        training.attach(unet, arm, **options)

    monkeypatch.setattr(sdxl, "attach", attach)
    (cell,) = [c for c in sdxl.cells(replace(PLAN, arms=("tlora",)), concepts[:1]) if c.r]
    records = list(sdxl.run(cell, concepts[0], lambda: tiny_sdxl(tokenizer, torch.bfloat16), judge))
    assert [step for step, _ in records] == [1, 2]
    trained = {p.dtype for p in kept[0].parameters() if p.requires_grad}
    frozen = {p.dtype for n, p in kept[0].named_parameters() if "lora" not in n}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def test_judge_tells_the_same_picture_from_another(judge):
    pictures = [render(Scene("star", c, "blue", "dotted", "center")) for c in ("red", "white")]
    for features in (judge.clip_images(pictures), judge.dino_images(pictures)):
        likeness = features @ features.T
        assert likeness.diagonal().tolist() == pytest.approx([1, 1], abs=1e-5)
        assert likeness[0, 1] < 1 - 1e-4
    assert judge.clip_texts(["a", "a dog"]).shape == (2, 16)


@euler
@pytest.mark.usefixtures("_quick")
def test_training_adds_noise_as_the_model_was_trained_not_as_euler_samples(
    tokenizer, judge, concepts, monkeypatch
):
    inputs = []
    (cell,) = [c for c in sdxl.cells(replace(PLAN, arms=("lora",)), concepts[:1]) if c.r]
    fit = training.fit

    def watched_fit(unet, *args, **options):
        watch = unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        yield from fit(unet, *args, **options)
        watch.remove()

    monkeypatch.setattr(sdxl, "fit", watched_fit)
    list(sdxl.run(replace(cell, steps=(10,)), concepts[0], lambda: tiny_sdxl(tokenizer), judge))
    levels = [x.std() for x in inputs[:10]]
    assert max(levels) < 3  # Euler's noise is up to 14.6 deviations,
    assert max(levels) - min(levels) > 0.3  # or none at all once it has sampled
