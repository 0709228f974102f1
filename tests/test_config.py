import pickle

import peft
import pytest
from peft import LoraConfig

from peft_tlora import TLoraConfig


def test_every_lora_argument_is_accepted_with_its_meaning():
    arguments = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["to_q", "to_k"],
        "exclude_modules": ["to_k"],
        "lora_dropout": 0.1,
        "bias": "lora_only",
        "use_rslora": True,
        "rank_pattern": {"to_q": 8},
        "alpha_pattern": {"to_q": 8},
        "modules_to_save": ["head"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "blocks",
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "fan_in_fan_out": True,
        "trainable_token_indices": [1],
        "layer_replication": [(0, 1)],
        "task_type": "CAUSAL_LM",
    }
    ours, theirs = TLoraConfig(**arguments).to_dict(), LoraConfig(**arguments).to_dict()
    assert {name: ours[name] for name in theirs if name != "peft_type"} == {
        name: value for name, value in theirs.items() if name != "peft_type"
    }
    assert ours["peft_type"] == "TLORA"


def test_the_defaults_are_the_papers():
    config = TLoraConfig()
    assert (config.min_rank, config.rank_schedule, config.schedule_exponent) == (0.5, "power", 1.0)
    assert (config.ortho_init, config.ortho_source) == ("last", "random")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", peft.ArrowConfig()),
        ("corda_config", peft.tuners.lora.config.CordaConfig()),
        ("eva_config", peft.EvaConfig()),
        ("loftq_config", peft.LoftQConfig()),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
        ("target_parameters", ["weight"]),
        ("lora_bias", True),
    ],
)
def test_options_without_a_meaning_are_refused_by_name_with_a_way_out_raises(option, value):
    with pytest.raises(ValueError, match=f"{option}=.* is not supported with T-LoRA: [a-zA-Z]+"):
        TLoraConfig(**{option: value})


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "corda", "loftq", "lora_ga", "nonsense"])
def test_other_initialisations_are_refused_with_a_way_out_raises(init):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*ortho_init"):
        TLoraConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"r": 0}, ValueError, "r must be at least 1"),
        ({"r": 8, "min_rank": 9}, ValueError, r"min_rank=9 .* \[0, 8\]"),
        ({"r": 8, "min_rank": 4, "rank_pattern": {"q": 2}}, ValueError, r"rank_pattern\['q'\]=2"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] must be at least 1"),
        ({"min_rank": -0.5}, ValueError, "min_rank=-0.5"),
        ({"min_rank": float("nan")}, ValueError, "min_rank=nan"),
        ({"min_rank": "half"}, TypeError, "min_rank must be an int"),
        ({"rank_schedule": "linear"}, ValueError, "'power', 'cosine', 'constant'"),
        ({"schedule_exponent": -1.0}, ValueError, "schedule_exponent must be .* above 0"),
        ({"schedule_exponent": float("nan")}, ValueError, "schedule_exponent"),
        ({"rank_schedule": "constant", "schedule_exponent": 2.0}, ValueError, "has no effect"),
        ({"ortho_init": "first"}, ValueError, "'last', 'middle', 'principal'"),
        ({"ortho_source": "svd"}, ValueError, "'random', 'weight'"),
        ({"ortho_init": None, "ortho_source": "weight"}, ValueError, "has no effect"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps must be .* above 0"),
        ({"timestep_reversed": "yes"}, TypeError, "timestep_reversed must be a bool"),
        ({"timestep_type": "edm"}, ValueError, "'linear', 'log_sigma'"),
        (
            {"timestep_type": "log_sigma", "num_train_timesteps": 1.0},
            ValueError,
            "num_train_timesteps=1.0 has no effect",
        ),
        (
            {"timestep_type": "log_sigma", "timestep_reversed": True},
            ValueError,
            "timestep_reversed=True has no effect",
        ),
        ({"library_name": "peft"}, ValueError, "'peft_tlora'"),
        ({"save_initial_factors": 0}, TypeError, "save_initial_factors must be a bool"),
        (
            {"save_initial_factors": True, "ortho_init": None},
            ValueError,
            "save_initial_factors=True has no effect with ortho_init=None",
        ),
        ({"init_seed": -1}, ValueError, r"init_seed must lie in \[0, 2\^63 - 1\]"),
        ({"init_seed": 2**63}, ValueError, r"init_seed must lie in \[0, 2\^63 - 1\]"),
        ({"init_seed": 1.5}, TypeError, "init_seed must be an int"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout must lie in"),
        ({"rank_multiple": 0}, ValueError, "rank_multiple must be at least 1"),
        ({"r": 9, "rank_multiple": 2}, ValueError, "r=9 must be a multiple of rank_multiple=2"),
        ({"min_rank": 3, "rank_multiple": 2}, ValueError, "min_rank=3 must be a multiple"),
        (
            {"rank_pattern": {"to_q": 3}, "rank_multiple": 2},
            ValueError,
            r"rank_pattern\['to_q'\]=3 must be a multiple",
        ),
    ],
)
def test_bad_values_raise_and_say_what_is_allowed(arguments, error, words):
    with pytest.raises(error, match=words):
        TLoraConfig(**arguments)


def test_min_rank_keeps_its_kind_through_a_saved_config(tmp_path):
    for min_rank in (2, 0.25, 1.0, 1):
        TLoraConfig(r=4, min_rank=min_rank).save_pretrained(tmp_path)
        loaded = TLoraConfig.from_pretrained(tmp_path)
        assert loaded.min_rank == min_rank
        assert type(loaded.min_rank) is type(min_rank)


def test_a_saved_config_is_found_by_its_peft_type(tmp_path):
    TLoraConfig(r=4, rank_schedule="cosine").save_pretrained(tmp_path)
    assert '"library_name": "peft_tlora"' in (tmp_path / "adapter_config.json").read_text()
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is TLoraConfig
    assert loaded.rank_schedule == "cosine"


def test_a_config_pickles():
    config = TLoraConfig(r=4, min_rank=1, target_modules=["a"])
    assert pickle.loads(pickle.dumps(config)) == config
