"""Plain LoRA at one mask, read back by diffusers' own loaders."""

import diffusers
import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file

from peft_tlora import TLoraConfig
from peft_tlora.formats.lora import LORA_NAMES, write_lora
from peft_tlora.formats.plain import plain_lora

from .tiny import families
from .tiny.families import MIDDLE, expected_deltas

PIPELINES = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
    "wan": diffusers.WanPipeline,
}
# diffusers reads no SD3 with kohya's names; test_format_matrix.py has it
READABLE = [
    (family, name)
    for family in families.FAMILIES
    for name in LORA_NAMES
    if (family, name) != ("sd3", "kohya")
]

# diffusers takes the single blocks of kohya's FLUX for 3072 wide
LAYERS = {
    ("flux", "kohya"): r"transformer_blocks\..*\.(attn\.(to_.|to_out\.0|add_._proj)|norm1\.linear)"
}


def loaded_deltas(family, path):
    """The updates that diffusers makes of a plain LoRA file, by layer."""
    base, cls = families.model(family), PIPELINES[family]
    options = {"unet_config": base.config} if family in ("sd", "sdxl") else {}
    if family == "flux":
        options = {"return_alphas": True}
    found = cls.lora_state_dict(load_file(path), **options)
    state_dict, alphas = found if isinstance(found, tuple) else (found, None)
    options = {} if family in ("sd3", "wan") else {"network_alphas": alphas}
    load = cls.load_lora_into_unet if family in ("sd", "sdxl") else cls.load_lora_into_transformer
    load(state_dict, **options, **{_part(cls): base}, adapter_name="plain")
    return {
        name: module.get_delta_weight("plain")
        for name, module in base.named_modules()
        if hasattr(module, "lora_A")
    }


def _part(cls):
    return (
        "unet" if "StableDiffusion" in cls.__name__ and "3" not in cls.__name__ else "transformer"
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("family", "names"), READABLE)
def test_diffusers_loads_each_file_and_makes_the_masked_update_of_it(tmp_path, family, names):
    adapter = families.adapter(family, LAYERS.get((family, names)), ortho_init="last")
    t = MIDDLE.get(family, 500)
    lora = plain_lora(adapter, timestep=t)
    assert {len(down) for down, _ in lora.layers.values()} == {8}
    path = write_lora(lora, tmp_path / "plain.safetensors", names, family=family)
    found = loaded_deltas(family, path)
    expected = expected_deltas(adapter, t)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name].double(), delta, atol=1e-6, rtol=1e-5, msg=name)


def test_kohyas_flux_has_one_layer_for_four_and_leaves_rows_without_an_adapter_alone(tmp_path):
    parts = ("to_q", "to_v")
    adapter = families.adapter("flux", rf"single_transformer_blocks.*\.({'|'.join(parts)})")
    path = write_lora(plain_lora(adapter), tmp_path / "k.safetensors", "kohya", family="flux")
    tensors, expected = load_file(path), expected_deltas(adapter, 0.0)
    key = "lora_unet_single_blocks_0_linear1"
    delta = (tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]).double()
    size = len(expected["single_transformer_blocks.0.attn.to_q"])
    assert len(delta) == 7 * size
    for name, rows in zip(("to_q", "to_k", "to_v"), delta.split(size), strict=False):
        wanted = expected.get(f"single_transformer_blocks.0.attn.{name}", torch.zeros_like(rows))
        torch.testing.assert_close(rows, wanted, atol=1e-6, rtol=1e-5)
    assert not delta[3 * size :].any()


@pytest.mark.parametrize("rank", [1, 3, 7, 20])
def test_a_truncated_lora_is_the_best_of_its_rank_and_says_what_is_lost(rank):
    adapter = families.adapter("sd")
    lora = plain_lora(adapter, rank=rank)
    lost = total = 0.0
    for name, delta in expected_deltas(adapter, 0).items():
        down, up = (f.double() for f in lora.layers[name])
        assert len(down) <= rank
        values = torch.linalg.svdvals(delta.flatten(1))
        error = (up.flatten(1) @ down.flatten(1) - delta.flatten(1)).norm() ** 2
        best = (values[rank:] ** 2).sum()
        torch.testing.assert_close(error, best, atol=1e-9, rtol=1e-4)
        lost, total = lost + best, total + (values**2).sum()
    assert lora.error == pytest.approx((lost / total).sqrt().item(), abs=1e-5)
    assert (lora.error == 0) == (rank >= 12)


def test_layers_without_an_active_rank_are_left_out_and_an_empty_lora_raises():
    adapter = families.adapter("sd", ["to_q", "to_k"], r=6, rank_pattern={"to_k": 1}, min_rank=0)
    assert all(name.endswith("to_q") for name in plain_lora(adapter, timestep=500).layers)
    with pytest.raises(ValueError, match=r"No rank is active at timestep 1000"):
        plain_lora(adapter, timestep=1000)


def test_a_family_that_cannot_be_told_or_a_layer_without_a_name_raises(tmp_path):
    lora = plain_lora(families.adapter("wan", r".*proj_out"))
    with pytest.raises(ValueError, match=r"must be one of .*got None: pass family"):
        write_lora(lora, tmp_path, "kohya", family=None)
    with pytest.raises(ValueError, match="Layer proj_out has no name in the wan model of kohya"):
        write_lora(lora, tmp_path, "kohya", family="wan")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_a_convolution_in_groups_raises():
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    inject_adapter_in_model(TLoraConfig(r=4, target_modules=["0"]), base, adapter_name="toy")
    with pytest.raises(ValueError, match="convolution with groups"):
        plain_lora(families.adapter_of(base))
