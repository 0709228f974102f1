"""What hosts do to LoRA's tensors without asking what they are, done to T-LoRA's.

Each expected value is that of the adapter as it was; what LoRA itself loses is the bound where the
host rounds.
"""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

from peft_tlora import TLoraConfig, load_tlora_weights

from .conftest import TinyDenoiser, perturb, tiny_unet
from .tiny import pipelines
from .tiny.pipelines import generate, save_weights

SECOND_ADAPTER = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TIMES = (0, 400, 999)


def config_of(cls=TLoraConfig, **fields):
    fields = {"r": 4, "lora_alpha": 3, "min_rank": 1, "target_modules": TARGETS, **fields}
    if cls is LoraConfig:
        del fields["min_rank"]
    return cls(**fields)


def adapted(cls=TLoraConfig, scale=0.3, seed=0, **fields):
    """A U-Net with an adapter that was made in a process of its own."""
    unet = tiny_unet()
    torch.manual_seed(seed)
    unet.add_adapter(config_of(cls, **fields))
    perturb(unet, scale)
    return unet


@torch.no_grad()
def outputs(unet):
    generator = torch.Generator().manual_seed(2)
    x, e = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 3, 16)))
    return torch.cat([unet(x, t, e).sample for t in TIMES])


def off(unet, other):
    """The difference of two adapters' outputs as a share of the second one's effect."""
    wanted = outputs(other)
    return float((outputs(unet) - wanted).norm() / (wanted - outputs(tiny_unet())).norm())


def trained(unet):
    return {n: p.detach().clone() for n, p in unet.named_parameters() if p.requires_grad}


def without_name(tensors):
    return {name.replace(".default", ""): tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------------- the trained half on its own


def load_in_place(unet, tensors):
    unet.load_state_dict(tensors, strict=False)


def load_with_peft(unet, tensors):
    set_peft_model_state_dict(unet, without_name(tensors))


def restore_averages(unet, tensors):
    for name, parameter in unet.named_parameters():
        if name in tensors:
            parameter.data.copy_(tensors[name])


@pytest.mark.parametrize("load", [load_in_place, load_with_peft, restore_averages])
@pytest.mark.parametrize("ortho", ["last", None])
def test_trained_tensors_alone_are_the_adapter_in_another_process(load, ortho):
    unet = adapted(ortho_init=ortho)
    other = adapted(ortho_init=ortho, scale=0, seed=77)
    load(other, trained(unet))
    assert off(other, unet) == 0


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@SECOND_ADAPTER
@pytest.mark.parametrize("nested", [False, True])
def test_an_adapters_parameters_copied_into_another_make_it_the_same(nested):
    model = get_peft_model(tiny_unet(), config_of())
    if nested:
        model = get_peft_model(model, config_of(), adapter_name="old")
    else:
        model.add_adapter("old", config_of())
    perturb(model)
    model.base_model.set_adapter("default")
    wanted = outputs(model)
    parameters = dict(model.named_parameters())
    copied = [name for name in parameters if ".default." in name and ".lora_" in name]
    assert copied
    for name in copied:
        parameters[name.replace(".default.", ".old.")].data.copy_(parameters[name].data)
    model.base_model.set_adapter("old")
    assert torch.equal(outputs(model), wanted)


@pytest.mark.parametrize("load", [load_in_place, load_with_peft])
def test_the_weights_of_plain_lora_are_refused(load):
    unet = adapted()
    before = outputs(unet)
    with pytest.raises(ValueError, match="plain LoRA, which would act beside the start"):
        load(unet, trained(adapted(LoraConfig)))
    assert torch.equal(outputs(unet), before)


# --------------------------------------------------------------------- casts, averages, quantising


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["trained", "frozen", "both"])
def test_the_start_is_the_identity_whatever_half_is_cast(dtype, half):
    unet = adapted(scale=0)
    for name, tensor in [*unet.named_parameters(), *unet.named_buffers()]:
        if "lora_" in name and half in ("both", "frozen" if "_init" in name else "trained"):
            tensor.data = tensor.data.to(dtype)
    assert torch.equal(outputs(unet), outputs(tiny_unet()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"save_initial_factors": True}], ids=["", "full"])
def test_a_file_whose_every_tensor_was_cast_loads(dtype, fields, tmp_path):
    pipeline, loaded = pipelines.stable_diffusion(), pipelines.stable_diffusion()
    pipeline.unet.add_adapter(config_of(**fields))
    perturb(pipeline.unet)
    weights = get_peft_model_state_dict(pipeline.unet)
    cast = convert_state_dict_to_diffusers({name: t.to(dtype) for name, t in weights.items()})
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=cast)
    loaded.load_lora_weights(str(tmp_path))
    assert off(loaded.unet, pipeline.unet) <= 4 * torch.finfo(dtype).eps


def test_the_average_of_two_checkpoints_is_the_adapter_of_the_averaged_factors():
    one, two, wanted = adapted(), adapted(scale=0.1), adapted(scale=0)
    a, b = (get_peft_model_state_dict(unet) for unet in (one, two))
    for parameter, first, second in zip(
        wanted.parameters(), one.parameters(), two.parameters(), strict=True
    ):
        parameter.data = (first.data + second.data) / 2
    loaded = adapted(scale=0, seed=77)
    set_peft_model_state_dict(loaded, {name: (a[name] + b[name]) / 2 for name in a})
    assert off(loaded, wanted) < 1e-6


def test_the_average_of_different_schedules_is_refused():
    a, b = (get_peft_model_state_dict(adapted(min_rank=rank)) for rank in (1, 2))
    with pytest.raises(ValueError, match=r"lora_schedule of layer down_blocks.*averaged"):
        set_peft_model_state_dict(adapted(), {name: (a[name] + b[name]) / 2 for name in a})


@pytest.mark.parametrize("cls", [LoraConfig, TLoraConfig])
@pytest.mark.parametrize("targets", [TARGETS, ["conv1", "to_q"]], ids=["linear", "convolutions"])
def test_a_bf16_script_computes_what_its_file_will(cls, targets):
    """Trained in float32 under autocast, loaded into a bfloat16 pipeline."""
    unet, loaded = tiny_unet().bfloat16(), tiny_unet().bfloat16()
    unet.add_adapter(config_of(cls, target_modules=targets, lora_alpha=4))
    cast_training_params(unet, dtype=torch.float32)
    perturb(unet)
    loaded.load_lora_adapter(get_peft_model_state_dict(unet), prefix=None, low_cpu_mem_usage=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(unet), outputs(loaded))


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_load_into_a_bf16_model_rounds_as_it_rounds_lora(scale, low_cpu_mem_usage):
    lost = {}
    for cls in (LoraConfig, TLoraConfig):
        file = get_peft_model_state_dict(adapted(cls, scale))
        low, exact = (tiny_unet().bfloat16() for _ in range(2))
        exact.float()
        base = outputs(exact)
        exact.load_lora_adapter(dict(file), prefix=None)
        low.load_lora_adapter(dict(file), prefix=None, low_cpu_mem_usage=low_cpu_mem_usage)
        wanted = outputs(exact)
        lost[cls] = float((outputs(low.float()) - wanted).norm() / (wanted - base).norm())
    assert lost[TLoraConfig] < lost[LoraConfig] + 1e-3
    assert lost[LoraConfig] < 5e-3


def test_layerwise_casting_to_8_bits_after_loading_costs_what_it_costs_lora():
    lost = {}
    for cls in (LoraConfig, TLoraConfig):
        exact, low = adapted(cls, 0.05), adapted(cls, 0.05)
        apply_layerwise_casting(
            low,
            storage_dtype=torch.float8_e4m3fn,
            compute_dtype=torch.float32,
            skip_modules_pattern=None,
        )
        update, wanted = outputs(low), outputs(exact) - outputs(tiny_unet())
        low.disable_adapters()
        update -= outputs(low)
        lost[cls] = float((update - wanted).norm() / wanted.norm())
    assert lost[TLoraConfig] < lost[LoraConfig] + 0.05


@pytest.mark.parametrize("cls", [LoraConfig, TLoraConfig])
def test_a_bf16_adapter_trains(cls):
    """Differences from the start hold steps that whole factors in 16 bits would round away."""
    unet = adapted(cls, scale=0)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    before = trained(unet)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    for _ in range(10):
        unet(x, torch.tensor([0, 0]), e).sample.square().mean().backward()
        optimizer.step()
    moved = [
        (tensor != before[name]).float().mean()
        for name, tensor in trained(unet).items()
        if cls is TLoraConfig or "lora_B" in name
    ]
    assert torch.stack(moved).mean() > 0.9


# ------------------------------------------------------------------------- devices and optimizers


@SECOND_ADAPTER
@pytest.mark.parametrize("cls", [LoraConfig, TLoraConfig])
def test_set_lora_device_moves_all_of_an_adapter_and_nothing_else(cls):
    pipeline = pipelines.stable_diffusion()
    for name in ("toy", "other"):
        pipeline.unet.add_adapter(config_of(cls), name)
    pipeline.set_lora_device(["toy"], "meta")
    for name, tensor in [*pipeline.unet.named_parameters(), *pipeline.unet.named_buffers()]:
        assert tensor.is_meta == (".toy." in name), name


def test_lambda_counts_as_lora_a_for_lora_plus():
    model = get_peft_model(tiny_unet(), config_of())
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (16e-4 if "lora_B" in name else 1e-4), name


def test_muon_trains():
    unet = adapted(scale=0)
    muon = torch.optim.Muon([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    for _ in range(2):
        muon.zero_grad()
        unet(x, torch.tensor([100, 10]), e).sample.square().mean().backward()
        muon.step()
    assert all(tensor.any() for tensor in trained(unet).values())


@pytest.mark.parametrize("cls", [LoraConfig, TLoraConfig])
@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_lora_fa_refuses_lambda_and_still_takes_lora(cls):
    model = get_peft_model(tiny_unet(), config_of(cls))
    optimizer = create_lorafa_optimizer(model, 4, 4, 1e-3)
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    model(x, torch.tensor([100, 10]), e).sample.square().mean().backward()
    if cls is LoraConfig:
        optimizer.step()
        return
    with pytest.raises(ValueError, match="LoRA-FA optimizer is not supported with T-LoRA"):
        optimizer.step()


# ---------------------------------------------------------------------------- layers and loaders


def test_a_convolution_without_an_active_rank_is_its_base():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x, timestep):
            return self.layers(x)

    config = TLoraConfig(r=4, min_rank=0, target_modules=["layers.0"], num_train_timesteps=1000)
    adapted = inject_adapter_in_model(config, Denoiser())
    perturb(adapted)
    for timestep in (1000, torch.tensor(1000), torch.tensor([1000, 1000])):
        output = adapted(x, timestep)
        assert torch.equal(output, expected)
    output.sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    samples = adapted(x, torch.tensor([1000, 0]))
    assert torch.equal(samples[0], expected[0])
    assert not torch.equal(samples[1], expected[1])


@SECOND_ADAPTER
@pytest.mark.parametrize("fields", [{}, {"save_initial_factors": True}], ids=["", "full"])
def test_an_adapter_fits_a_layer_that_a_control_adapter_has_widened(tmp_path, fields):
    """diffusers pads the file's lora_A with zeros there, and nothing else."""
    plain = pipelines.flux()
    plain.transformer.add_adapter(config_of(target_modules=["x_embedder", "to_q"], **fields))
    perturb(plain.transformer)
    save_weights(plain, tmp_path)
    wide = pipelines.flux()
    embedder = wide.transformer.x_embedder
    width = embedder.in_features
    control = {
        "transformer.x_embedder.lora_A.weight": torch.zeros(2, 2 * width),
        "transformer.x_embedder.lora_B.weight": torch.zeros(embedder.out_features, 2),
    }
    wide.load_lora_weights(control, adapter_name="control")
    wide.load_lora_weights(str(tmp_path), adapter_name="toy")
    x = torch.randn(1, 5, width)
    for t in (0.1, 0.9):
        narrow = plain.transformer.x_embedder
        narrow.timestep_state.begin_forward(torch.tensor([t]))
        expected = narrow(x)
        layer = wide.transformer.x_embedder
        layer.timestep_state.begin_forward(torch.tensor([t]))
        torch.testing.assert_close(layer(torch.cat([x, x], dim=-1)), expected)


def test_a_folder_of_peft_loads_into_a_pipeline(tmp_path):
    model = get_peft_model(tiny_unet(), config_of())
    perturb(model)
    model.save_pretrained(tmp_path)
    pipeline = pipelines.stable_diffusion()
    pipeline.load_lora_weights(str(tmp_path), adapter_name="toy")
    assert pipeline.get_list_adapters() == {"unet": ["toy"]}
    assert off(pipeline.unet, model.get_base_model()) == 0
    again = pipelines.stable_diffusion()
    load_tlora_weights(again, tmp_path)
    assert torch.equal(generate(again), generate(pipeline))


def test_trained_tensors_alone_are_refused_by_a_pipeline_and_load_with_their_config():
    unet = adapted(init_seed=3)
    pipeline = pipelines.stable_diffusion()
    half = {f"unet.{name}": t for name, t in without_name(trained(unet)).items()}
    with pytest.raises(ValueError, match=r"without its lora_schedule.*config=TLoraConfig"):
        pipeline.load_lora_weights(dict(half))
    with pytest.raises(ValueError, match="pass the config that they were trained with"):
        load_tlora_weights(pipeline, half)
    assert not hasattr(pipeline.unet, "peft_config")
    load_tlora_weights(pipeline, half, config=config_of(init_seed=3))
    assert off(pipeline.unet, unet) == 0


class Host(nn.Module):
    """A trainer's module around a denoiser, without any loader."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pipe = nn.ModuleDict({"dit": TinyDenoiser()})


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.pipe.dit.", "_orig_mod."])
@pytest.mark.parametrize("adapter", ["", ".default"])
@pytest.mark.parametrize("half", [True, False])
def test_a_module_of_any_host_takes_a_state_dict_under_any_prefix(prefix, adapter, half):
    config = TLoraConfig(r=4, min_rank=1, target_modules=["to_q", "to_out"])
    torch.manual_seed(0)
    model = inject_adapter_in_model(config, TinyDenoiser())
    perturb(model)
    weights = get_peft_model_state_dict(model)
    weights = {
        prefix + name.replace(".weight", f"{adapter}.weight"): tensor
        for name, tensor in weights.items()
        if not (half and "schedule" in name)
    }
    host = Host()
    load_tlora_weights(host, weights, "toy", config=config if half else None)
    loaded = host.pipe["dit"]
    x = torch.randn(2, 3, 8)
    for t in (torch.tensor([0, 900]), torch.tensor(999)):
        assert torch.equal(loaded(x, t), model(x, t))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, "Layer to_q has rank 4 in the source and 8 in the config"),
        ({"rank_pattern": {"to_q": 2}}, "Layer to_q has rank 4 in the source and 2 in the config"),
        ({"ortho_init": None}, "ortho_init=None layer to_q needs lora_A, lora_B, the source has"),
        ({"ortho_source": "weight"}, "ortho_source='weight': the adapter started from"),
        ({"init_seed": None}, "init_seed=None: "),
    ],
)
def test_a_config_that_does_not_fit_trained_tensors_is_refused(config, words):
    model = inject_adapter_in_model(TLoraConfig(r=4, target_modules=["to_q"]), TinyDenoiser())
    weights = {n: t for n, t in get_peft_model_state_dict(model).items() if "schedule" not in n}
    host = TinyDenoiser()
    load_tlora_weights(TinyDenoiser(), weights, config=TLoraConfig(r=4))
    with pytest.raises(ValueError, match=words):
        load_tlora_weights(host, weights, config=TLoraConfig(**{"r": 4, **config}))
    assert not hasattr(host, "peft_config")


def test_a_config_beside_a_whole_file_and_plain_lora_with_one_are_refused():
    whole = get_peft_model_state_dict(adapted())
    with pytest.raises(ValueError, match="says itself how the adapter was trained"):
        load_tlora_weights(tiny_unet(), whole, config=config_of())
    plain = get_peft_model_state_dict(adapted(LoraConfig))
    with pytest.raises(ValueError, match="Is it plain LoRA, or was it"):
        load_tlora_weights(tiny_unet(), plain, config=config_of())
    with pytest.raises(ValueError, match="none belongs to a T-LoRA adapter"):
        load_tlora_weights(tiny_unet(), plain)


def test_a_wrong_base_is_refused_before_it_changes():
    half = {n: t for n, t in get_peft_model_state_dict(adapted()).items() if "schedule" not in n}
    other = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(24, 48),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with pytest.raises(ValueError, match="doesn't fit"):
        load_tlora_weights(other, half, config=config_of())
    assert not hasattr(other, "peft_config")


def test_attention_takes_trained_tensors_as_well_as_whole_files():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, timestep):
            return self.attn(x, x, x)[0]

    config = TLoraConfig(r=4, target_modules=["attn"], num_train_timesteps=1000)
    trained = inject_adapter_in_model(config, Attention())
    perturb(trained)
    weights = get_peft_model_state_dict(trained)
    half = {name: tensor for name, tensor in weights.items() if "schedule" not in name}
    x = torch.randn(2, 3, 8)
    for source, given in ((weights, None), (half, config)):
        model = Attention()
        load_tlora_weights(model, source, config=given)
        assert torch.equal(model(x, torch.tensor(700)), trained(x, torch.tensor(700)))


def test_two_tensors_of_one_place_and_several_adapters_are_refused():
    whole = get_peft_model_state_dict(adapted())
    twice = whole | {f"unet.{name}": tensor for name, tensor in whole.items()}
    with pytest.raises(ValueError, match="says again what another tensor"):
        load_tlora_weights(tiny_unet(), twice)
    half = trained(adapted())
    both = half | {name.replace(".default.", ".old."): t for name, t in half.items()}
    with pytest.raises(ValueError, match=r"several adapters, \['default', 'old'\]"):
        load_tlora_weights(tiny_unet(), both, config=config_of())
