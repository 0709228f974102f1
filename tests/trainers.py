"""Files of tiny adapters as other trainers write them, with the adapter and what has to be said."""

from dataclasses import replace

import torch

from peft_tlora.formats.facts import TrainingFacts
from peft_tlora.formats.names import original

from . import foreign
from .tiny import families

FACTS = TrainingFacts(min_rank=2, rank_schedule="power", schedule_exponent=1.0)
METADATA = {
    "ss_tlora_min_rank": "2",
    "ss_tlora_alpha_rank_scale": "1.0",
    "ss_tlora_max_timestep": "1000",
    "ss_tlora_init": "orthogonal",
    "ss_tlora_sig_type": "last",
}
HPARAMS = "trainer_class: sdxl_tlora\ntrainer_type: ortho_lora\nlora_rank: 6\nmin_rank: 2\n"
ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


def wan_name(name):
    return original("wan", name).name


def sgm_name(name):
    return original("sdxl", name).name


def official_sdxl(folder, family="sdxl", **fields):
    adapter = families.adapter(family, ATTENTION, lora_alpha=6, num_train_timesteps=1000, **fields)
    path = folder / "pytorch_lora_weights.safetensors"
    foreign.save(path, foreign.official_sdxl(adapter))
    (folder / "logs").mkdir()
    (folder / "logs" / "hparams.yml").write_text(HPARAMS)
    return path, foreign.read_back(adapter), {}


def official_flux(folder, family="flux", ortho_init=None):
    layers = r"transformer_blocks.*\.attn\.(to_[qkv]|to_out\.0|add_._proj)"
    layers += r"|single_transformer_blocks.*\.attn\.to_[qkv]"
    adapter = families.adapter(family, layers, lora_alpha=6, ortho_init=ortho_init)
    path = foreign.save(folder / "lora.pt", foreign.official_flux(adapter))
    facts = TrainingFacts(min_rank=2, rank_schedule="power")
    return path, foreign.read_back(adapter), {"facts": facts, "allow_pickle": True}


def sd_scripts(folder, family="sd", **fields):
    adapter = families.adapter(family, num_train_timesteps=1000, **fields)
    tensors = foreign.sd_scripts(adapter, sgm_name if family == "sdxl" else str)
    path = foreign.save(folder / "adapter.safetensors", tensors, METADATA)
    return path, foreign.read_back(adapter), {"base": families.model(family)}


def takenoko(folder, family="wan", **fields):
    adapter = families.adapter(family, **fields)
    path = foreign.save(folder / "adapter.safetensors", foreign.takenoko(adapter, wan_name))
    facts = TrainingFacts(min_rank=2, schedule_exponent=1.0, boundary_timestep=0)
    return path, foreign.read_back(adapter), {"base": families.model(family), "facts": facts}


LYCORIS_FACTS = TrainingFacts(
    min_rank=2,
    rank_schedule="power",
    schedule_exponent=1.0,
    num_train_timesteps=1000,
    sig_type="principal",
)
LYCORIS_LAYERS = r".*\.attn.*\.(to_q|to_k|to_v|to_out\.0)"


def lycoris(folder, family="sd3", sig_type="principal", prefix="lycoris_", random=False, **fields):
    """An adapter as LyCORIS trains it, its file and its base."""
    fields = {"r": 4, "min_rank": 2, "lora_alpha": 3, "ortho_init": sig_type, **fields}
    adapter, base = families.adapter(family, LYCORIS_LAYERS, **fields), families.model(family)
    layers = {}
    for name, layer in adapter.layers.items():  # closer to the start than what perturb does
        dq, dp, dlam, *start = layer.factors
        if not random:
            start = triplets(base.get_submodule(name).weight, len(dq), sig_type)
        factors = type(layer.factors)(0.1 * dq, 0.1 * dp, dlam, *start)
        layers[name] = replace(layer, factors=factors, recipe=None)
    adapter = replace(adapter, layers=layers)
    path = foreign.save(folder / "a.safetensors", foreign.lycoris(adapter, prefix))
    return path, foreign.read_back(adapter), base


def triplets(weight, r, sig_type):
    """Where LyCORIS' factors start, in float32 and not rounded as this package's are."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    first = {"principal": 0, "last": len(s) - r}[sig_type]
    window = slice(first, first + r)
    return vh[window], u[:, window], s[window, None]
