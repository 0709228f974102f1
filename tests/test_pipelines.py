"""Whole pipelines of diffusers: loading and switching adapters, memory modes, other entrances."""

import accelerate
import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from peft_tlora import TLoraConfig, load_tlora_weights, timestep_context
from peft_tlora.hosts import diffusers as integration
from peft_tlora.integrations import diffusers as loaders

from .conftest import Watch, assert_masks_follow, first_layer, perturb
from .tiny import pipelines
from .tiny.pipelines import denoiser, generate, save_weights

MAKE = {"unet": pipelines.stable_diffusion, "transformer": pipelines.flux}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
KINDS = pytest.mark.parametrize("kind", MAKE)


def save(folder, kind, config_cls=TLoraConfig, seed=1, **kwargs):
    """Train, as it were, an adapter and save it as the scripts do; the picture it makes."""
    pipeline = MAKE[kind]()
    model = denoiser(pipeline)
    model.add_adapter(config_cls(r=4, target_modules=TARGETS, **kwargs))
    perturb(model, 2.0 if kind == "transformer" else 0.3, seed)
    save_weights(pipeline, folder)
    return generate(pipeline)


def loaded(folder, kind, **kwargs):
    pipeline = MAKE[kind]()
    pipeline.load_lora_weights(str(folder), **{"adapter_name": "toy", **kwargs})
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and picture of a T-LoRA, another T-LoRA and a plain LoRA, for each kind."""
    found = {}
    for kind in MAKE:
        for name, cls in (("toy", TLoraConfig), ("other", TLoraConfig), ("plain", LoraConfig)):
            folder = tmp_path_factory.mktemp(f"{kind}-{name}")
            # diffusers forgets the lora_alpha of a plain LoRA without metadata
            extra = {"lora_alpha": 4} if name == "plain" else {"lora_alpha": 2, "min_rank": 1}
            picture = save(folder, kind, cls, seed=len(name), **extra)
            found[kind, name] = (folder, picture)
        found[kind, "base"] = (None, generate(MAKE[kind]()))
    return found


@KINDS
@pytest.mark.parametrize("source", ["folder", "file", "state dict", "public function"])
def test_every_source_gives_the_same_picture(saved, kind, source):
    folder, picture = saved[kind, "toy"]
    file = folder / "pytorch_lora_weights.safetensors"
    pipeline = MAKE[kind]()
    if source == "public function":
        loaders.unwrap()
        try:
            load_tlora_weights(pipeline, folder)
        finally:
            integration.install()
    elif source == "state dict":
        weights = pipeline.lora_state_dict(str(file))
        pipeline.load_lora_weights(weights[0] if isinstance(weights, tuple) else weights)
    else:
        pipeline.load_lora_weights(str(folder if source == "folder" else file))
    assert type(denoiser(pipeline).peft_config["default_0"]) is TLoraConfig
    assert torch.equal(generate(pipeline), picture)
    assert not torch.equal(picture, saved[kind, "base"][1])
    pipeline.set_adapters("default_0", 0.0)
    torch.testing.assert_close(generate(pipeline), saved[kind, "base"][1])


def test_load_tlora_weights_loads_text_encoders_too(tmp_path):
    trained = pipelines.stable_diffusion()
    trained.unet.add_adapter(TLoraConfig(target_modules=["to_q"]))
    trained.text_encoder.add_adapter(TLoraConfig(target_modules=["q_proj"]))
    for part in (trained.unet, trained.text_encoder):
        perturb(part)
    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(getattr(trained, name))
        )
        for name in ("unet", "text_encoder")
    }
    trained.save_lora_weights(tmp_path, **layers)
    pipeline = pipelines.stable_diffusion()
    load_tlora_weights(pipeline, tmp_path, "toy", weight_name="pytorch_lora_weights.safetensors")
    assert pipeline.get_list_adapters() == {"unet": ["toy"], "text_encoder": ["toy"]}
    ids = torch.arange(5)[None]
    states = [p.text_encoder(ids).last_hidden_state for p in (trained, pipeline)]
    assert torch.equal(*states)
    assert torch.equal(generate(trained), generate(pipeline))


def test_load_tlora_weights_raises_before_it_changes_anything(saved):
    pipeline = pipelines.stable_diffusion()
    with pytest.raises(ValueError, match="none belongs to a T-LoRA adapter"):
        load_tlora_weights(pipeline, saved["unet", "plain"][0])
    assert not hasattr(pipeline.unet, "peft_config")
    load_tlora_weights(pipeline, saved["unet", "toy"][0], "toy")
    with pytest.raises(ValueError, match="name 'toy' is in use"):
        load_tlora_weights(pipeline, saved["unet", "toy"][0], "toy")
    assert torch.equal(generate(pipeline), saved["unet", "toy"][1])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@KINDS
@pytest.mark.parametrize("order", [("toy", "other", "plain"), ("plain", "toy", "other")])
def test_adapters_of_both_kinds_live_together(saved, kind, order):
    pipeline = MAKE[kind]()
    for name in order:
        pipeline.load_lora_weights(str(saved[kind, name][0]), adapter_name=name)
    for name in order:
        pipeline.set_adapters(name)
        assert pipeline.get_active_adapters() == [name]
        assert torch.equal(generate(pipeline), saved[kind, name][1])
    pipeline.set_adapters(["toy", "plain"], [0.5, 0.25])
    mixed = generate(pipeline)
    pipeline.delete_adapters("other")
    assert torch.equal(generate(pipeline), mixed)
    pipeline.disable_lora()
    torch.testing.assert_close(generate(pipeline), saved[kind, "base"][1])
    pipeline.enable_lora()
    assert torch.equal(generate(pipeline), mixed)
    pipeline.delete_adapters(["toy", "plain"])
    pipeline.unload_lora_weights()
    assert torch.equal(generate(pipeline), saved[kind, "base"][1])


def test_weights_for_each_block_scale_its_layers(saved):
    pipeline = loaded(saved["unet", "toy"][0], "unet")
    pipeline.set_adapters("toy", {"unet": {"down": 0.5, "mid": 0.0, "up": {"block_1": 2.0}}})
    scales = {
        name.partition(".")[0]: module.scaling["toy"]
        for name, module in pipeline.unet.named_modules()
        if hasattr(module, "scaling")
    }
    assert scales == {"down_blocks": 0.25, "mid_block": 0.0, "up_blocks": 1.0}
    per_block = generate(pipeline)
    assert not torch.equal(per_block, saved["unet", "toy"][1])


@pytest.mark.parametrize(
    ("kind", "argument"),
    [("unet", "cross_attention_kwargs"), ("transformer", "joint_attention_kwargs")],
)
def test_the_scale_of_a_call_is_the_adapters_weight(saved, kind, argument):
    pipeline = loaded(saved[kind, "toy"][0], kind)
    scaled = generate(pipeline, **{argument: {"scale": 0.5}})
    assert torch.equal(generate(pipeline), saved[kind, "toy"][1])
    pipeline.set_adapters("toy", 0.5)
    torch.testing.assert_close(generate(pipeline), scaled)


@KINDS
def test_fuse_lora_warns_that_it_fixes_the_mask_and_unfuse_undoes_it(saved, kind):
    folder, picture = saved[kind, "toy"]
    pipeline = loaded(folder, kind)
    with timestep_context(denoiser(pipeline), 0.0):
        full_rank = generate(pipeline)
        with pytest.warns(UserWarning, match="fixes its mask"):
            pipeline.fuse_lora()
    torch.testing.assert_close(generate(pipeline), full_rank, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(full_rank, picture, atol=1e-2)
    pipeline.unfuse_lora()
    torch.testing.assert_close(generate(pipeline), picture, atol=1e-4, rtol=1e-4)


MODES = ["sequential", "model hooks", "group", "layerwise casting", "slicing and tiling"]
# accelerate can't offload the tiny Flux sequentially, without an adapter neither
MODES_OF = [(k, m) for k in MAKE for m in MODES if (k, m) != ("transformer", "sequential")]


@pytest.mark.parametrize(("kind", "mode"), MODES_OF)
def test_memory_modes_give_the_same_picture(saved, kind, mode, tmp_path, monkeypatch):
    folder, picture = saved[kind, "toy"]
    pipeline = loaded(folder, kind)
    model = denoiser(pipeline)
    if mode == "sequential":  # what enable_sequential_cpu_offload does to each model
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        assert model.get_submodule(first_layer(model) + ".lora_A.toy").weight.is_meta
    elif mode == "model hooks":  # enable_model_cpu_offload, device_map
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif mode == "group":
        # diffusers up to 0.40 asks for one although everything stays on the CPU
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        model.enable_group_offload(
            torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
        )
    elif mode == "layerwise casting":
        model.enable_layerwise_casting(torch.float32, torch.float32)
    else:
        pipeline.enable_attention_slicing()
        pipeline.vae.enable_tiling()
    torch.testing.assert_close(generate(pipeline), picture, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("to", ["before", "after"])
@KINDS
def test_a_bf16_pipeline_follows_the_float32_one(saved, kind, to):
    folder, picture = saved[kind, "toy"]
    pipeline = MAKE[kind]()
    if to == "before":
        pipeline.to(torch.bfloat16)
    pipeline.load_lora_weights(str(folder))
    pipeline.to(torch.bfloat16)
    base = saved[kind, "base"][1]
    rounding = (generate(MAKE[kind]().to(torch.bfloat16)) - base).norm()
    bound = 1.5 * rounding + 0.1 * (base - picture).norm()
    assert (generate(pipeline) - picture).norm() < bound


@KINDS
def test_hotswapping_is_refused_and_nothing_is_lost(saved, kind):
    pipeline = loaded(saved[kind, "toy"][0], kind)
    for name in ("other", "plain"):
        with pytest.raises(ValueError, match="Hotswapping 'toy' is not supported with T-LoRA"):
            pipeline.load_lora_weights(str(saved[kind, name][0]), adapter_name="toy", hotswap=True)
    assert torch.equal(generate(pipeline), saved[kind, "toy"][1])
    plain = loaded(saved[kind, "plain"][0], kind)
    with pytest.raises(ValueError, match="Hotswapping 'toy' is not supported with T-LoRA"):
        plain.load_lora_weights(str(saved[kind, "other"][0]), adapter_name="toy", hotswap=True)
    assert torch.equal(generate(plain), saved[kind, "plain"][1])
    prepared = MAKE[kind]()
    prepared.enable_lora_hotswap(target_rank=8)
    with pytest.raises(ValueError, match="enable_lora_hotswap is not supported with T-LoRA"):
        prepared.load_lora_weights(str(saved[kind, "toy"][0]))


@pytest.mark.parametrize(
    "entrance", ["img2img", "inpaint", "controlnet", "ip adapter", "callback", "timesteps"]
)
def test_the_mask_follows_the_timestep_through_every_entrance(saved, entrance):
    pipeline = loaded(saved["unet", "toy"][0], "unet")
    watch = Watch(pipeline.unet)
    image, kwargs = torch.rand(1, 3, 8, 8), {}
    if entrance == "img2img":
        pipeline = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
        kwargs = {"image": image, "strength": 0.8}
    elif entrance == "inpaint":
        pipeline = diffusers.AutoPipelineForInpainting.from_pipe(pipeline)
        kwargs = {"image": image, "mask_image": torch.ones(1, 1, 8, 8), "strength": 0.8}
    elif entrance == "controlnet":
        parts = {
            name: part for name, part in pipeline.components.items() if name != "image_encoder"
        }
        pipeline = pipelines.stable_diffusion(
            diffusers.StableDiffusionControlNetPipeline,
            controlnet=diffusers.ControlNetModel.from_unet(pipelines.tiny_unet()),
            **parts,
        )
        kwargs = {"image": image}
    elif entrance == "ip adapter":
        pipeline.unet._load_ip_adapter_weights([ip_adapter(pipeline.unet)])
        kwargs = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    elif entrance == "callback":
        kwargs = {"callback_on_step_end": lambda pipe, i, t, values: values}
    else:
        pipeline.scheduler = diffusers.LCMScheduler()
        kwargs = {"timesteps": [999, 499, 19]}
    generate(pipeline, steps=6, **kwargs)
    assert_masks_follow(watch, pipeline.scheduler)


def ip_adapter(unet):
    """Weights of an IP-Adapter for images of 6 features."""
    width = unet.config.cross_attention_dim
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    sizes = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in cross]
    return {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 6),
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {
            f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(size, width)
            for i, size in enumerate(sizes)
            for part in "kv"
        },
    }


def test_the_mask_follows_custom_sigmas(saved):
    pipeline = loaded(saved["transformer", "toy"][0], "transformer")
    watch = Watch(pipeline.transformer)
    generate(pipeline, sigmas=[1.0, 0.6, 0.2])
    assert_masks_follow(watch, pipeline.scheduler, scale=1000)
    assert [t for t, _ in watch.calls] == pytest.approx([1.0, 0.6, 0.2])


def test_the_mask_follows_the_timestep_of_modular_pipelines(saved):
    from diffusers.modular_pipelines.flux.denoise import FluxDenoiseStep
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    pipeline = loaded(saved["transformer", "toy"][0], "transformer")
    watch = Watch(pipeline.transformer)
    modular = FluxDenoiseStep().init_pipeline()
    modular.update_components(transformer=pipeline.transformer, scheduler=pipeline.scheduler)
    pipeline.scheduler.set_timesteps(4)
    state, inputs = PipelineState(), pipelines.image.flux_inputs(1)
    names = {"hidden_states": "latents", "encoder_hidden_states": "prompt_embeds"}
    names["pooled_projections"] = "pooled_prompt_embeds"
    for name, value in inputs.items():
        state.set(names.get(name, name), value)
    state.set("timesteps", pipeline.scheduler.timesteps)
    state.set("num_inference_steps", 4)
    modular.blocks.set_progress_bar_config(disable=True)
    modular.blocks(modular, state)
    assert_masks_follow(watch, pipeline.scheduler, scale=1000)
