"""Hosts that don't call the denoiser: functions that get the timestep, loaders, pipeline stages."""

import functools
import importlib
import sys
import textwrap

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_tlora
from peft_tlora import TLoraConfig, active_rank, timestep_from
from peft_tlora.hosts import trainers as hosts
from peft_tlora.integrations import imports

from .conftest import perturb


class Blocks(nn.Module):
    """What a host runs by itself; nobody calls its forward."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, x, timestep):
        raise AssertionError


def adapted(**kwargs):
    config = TLoraConfig(
        **{"r": 4, "min_rank": 1, "target_modules": ["to_q"], "num_train_timesteps": 1000, **kwargs}
    )
    model = inject_adapter_in_model(config, Blocks())
    perturb(model)
    return model


def rank(model, run):
    """The active rank of what `run` returns, told by which lambdas got gradient."""
    model.zero_grad()
    run().square().sum().backward()
    (lam,) = (p.grad for n, p in model.named_parameters() if "lora_lambda" in n)
    return int((lam != 0).sum())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a module of a host that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports._FINDER, "wraps", list(imports._FINDER.wraps))
    made = []

    def make(name, source):
        *packages, _ = parts = name.split(".")
        for i in range(len(packages)):
            folder = tmp_path.joinpath(*parts[: i + 1])
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
            made.append(".".join(parts[: i + 1]))
        tmp_path.joinpath(*parts).with_suffix(".py").write_text(textwrap.dedent(source))
        made.append(name)
        importlib.invalidate_caches()

    yield make
    for name in made:
        sys.modules.pop(name, None)


X = torch.ones(2, 3, 8)


def test_a_functions_argument_is_the_timestep_while_it_runs():
    @timestep_from("timestep")
    def run(dit, x, timestep, scale=1):
        return scale * dit.to_q(x)

    model = adapted()
    assert rank(model, lambda: run(model, X, 1000)) == 1
    assert rank(model, lambda: run(x=X, timestep=torch.tensor([300, 300]), dit=model)) == 3
    assert rank(model, lambda: run(model, X, timestep=0)) == 4
    with pytest.warns(UserWarning, match="ran without a timestep"):
        rank(model, lambda: run(model, X, None))
    assert run.__name__ == "run"


def test_scale_direction_path_and_model_can_be_told():
    class Trainer:
        def __init__(self, model):
            self.model = model

        @timestep_from(
            "batch['sigmas'][0]",
            model="self.model",
            num_train_timesteps=1.0,
            timestep_reversed=True,
        )
        def step(self, **kwargs):
            return self.model.to_q(X)

    model = adapted()
    trainer = Trainer(model)
    for t in (0.0, 0.3, 1.0):
        found = rank(model, lambda t=t: trainer.step(batch={"sigmas": [torch.tensor(t), None]}))
        assert found == active_rank(1000 * (1 - t), 4, 1)


def test_models_without_t_lora_are_left_alone():
    @timestep_from("t")
    def run(model, t):
        return model(X)

    plain = nn.Linear(8, 8)
    assert torch.equal(run(plain, 5), plain(X))


def test_a_function_without_the_argument_is_refused():
    with pytest.raises(ValueError, match=r"run has no argument 'sigma' for 'sigma\[0\]', but x, t"):

        @timestep_from("sigma[0]")
        def run(x, t):
            return x

    with pytest.raises(ValueError, match="num_train_timesteps"):
        timestep_from("t", num_train_timesteps=-1.0)


def test_a_call_that_the_function_refuses_is_its_own_error():
    @timestep_from("t")
    def run(model, t):
        return model

    with pytest.raises(TypeError, match="missing 1 required positional argument: 't'"):
        run(nn.Linear(2, 2))


@pytest.mark.parametrize("imported_before", [False, True])
def test_functions_of_other_packages_are_decorated_where_they_are(package, imported_before):
    package("somehost.run", "def run_blocks(dit, x, sigma):\n    return dit.to_q(x)\n")
    package("somehost.user", "from somehost.run import run_blocks\n")
    if imported_before:
        importlib.import_module("somehost.user")
    timestep_from("sigma", num_train_timesteps=1.0, function="somehost.run:run_*")
    user = importlib.import_module("somehost.user")
    model = adapted()
    for t, expected in ((1.0, 1), (0.5, 2), (0.0, 4)):
        assert rank(model, lambda t=t: user.run_blocks(model, X, t)) == expected


def test_methods_and_wildcards_reach_what_the_module_defines_itself(package):
    package("other.base", "def model_fn_text(x):\n    return x\n")
    package(
        "other.pipelines.wan",
        """
        from other.base import model_fn_text

        def model_fn_wan(dit, x, timestep):
            return dit.to_q(x)

        class Pipeline:
            def step(self, dit, x, timestep):
                return dit.to_q(x)
        """,
    )
    timestep_from("timestep", function="other.pipelines.*:model_fn_*")
    timestep_from("timestep", function="other.pipelines.*:Pipe*.step")
    wan = importlib.import_module("other.pipelines.wan")
    model = adapted()
    assert rank(model, lambda: wan.model_fn_wan(model, X, 1000)) == 1
    assert rank(model, lambda: wan.Pipeline().step(model, X, 1000)) == 1
    assert not hasattr(wan.model_fn_text, "__wrapped__")


def test_wrapping_again_as_after_a_reload_leaves_one_wrapper(package):
    package("again.run", "def step(x):\n    return [x]\n")
    module = importlib.import_module("again.run")

    def twice(function):
        @functools.wraps(function)
        def wrapper(x):
            return function(x) * 2

        return wrapper

    for _ in range(2):
        imports.wrap_function("again.run:step", twice)
    assert module.step(1) == [1, 1]


def test_a_module_that_fails_to_import_fails_as_it_would(package):
    package("broken.run", "raise OSError('its own')\n")
    timestep_from("t", function="broken.run:step")
    with pytest.raises(OSError, match="its own"):
        importlib.import_module("broken.run")


# ------------------------------------------------------------------------------- known hosts


def test_diffsynths_functions_give_the_timestep_by_themselves(package):
    package(
        "diffsynth.pipelines.some_video",
        """
        def model_fn_some_video(dit, latents, timestep=None):
            return dit.to_q(latents)

        def model_fn_without_time(dit, latents):
            return dit.to_q(latents)
        """,
    )
    module = importlib.import_module("diffsynth.pipelines.some_video")
    model = adapted()
    assert rank(model, lambda: module.model_fn_some_video(model, X, timestep=1000)) == 1
    assert rank(model, lambda: module.model_fn_some_video(model, X, timestep=0)) == 4
    assert not hasattr(module.model_fn_without_time, "__wrapped__")


def test_ominicontrol_has_the_mask_of_the_branch_that_is_denoised(package):
    package(
        "omini.pipeline.flux_omini",
        """
        def transformer_forward(transformer, image_features, timesteps):
            return transformer.to_q(image_features)
        """,
    )
    module = importlib.import_module("omini.pipeline.flux_omini")
    model = adapted()
    times = [torch.zeros(2), torch.full((2,), 0.7), torch.zeros(2)]
    found = rank(model, lambda: module.transformer_forward(model, X, timesteps=times))
    assert found == active_rank(700, 4, 1)


def half_file(tmp_path):
    model = adapted()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with pytest.warns(UserWarning, match="trained tensors"):
        save_file(trained, tmp_path / "half.safetensors")
    return load_file(tmp_path / "half.safetensors")


def test_a_loader_that_knows_a_and_b_alone_refuses_t_lora(package, tmp_path):
    package(
        "videox_fun.utils.lora_utils",
        """
        def merge_lora(pipeline, lora_path, multiplier):
            return "fused"
        """,
    )
    merge = importlib.import_module("videox_fun.utils.lora_utils").merge_lora
    package(
        "diffsynth.utils.lora.general",
        """
        class GeneralLoRALoader:
            def fuse_lora_to_base_model(self, model, state_dict, alpha=1.0):
                return "fused"
        """,
    )
    package(
        "ltx_core.loader.fuse_loras",
        """
        def apply_loras(model_sd, lora_sd_and_strengths, dtype):
            return "fused"
        """,
    )
    tensors = half_file(tmp_path)
    plain = {"to_q.lora_A.weight": torch.zeros(4, 8)}
    loader = importlib.import_module("diffsynth.utils.lora.general").GeneralLoRALoader()
    apply = importlib.import_module("ltx_core.loader.fuse_loras").apply_loras
    assert loader.fuse_lora_to_base_model(None, plain) == "fused"
    with pytest.raises(ValueError, match=r"knows plain LoRA only.*--to lora"):
        loader.fuse_lora_to_base_model(None, state_dict=tensors)

    with pytest.raises(ValueError, match="knows plain LoRA only"):
        merge(None, str(tmp_path / "half.safetensors"), 1.0)
    save_file(plain, tmp_path / "plain.safetensors")
    assert merge(None, str(tmp_path / "plain.safetensors"), 1.0) == "fused"

    class StateDict:
        def __init__(self, sd):
            self.sd = sd

    class Strong:
        def __init__(self, state_dict):
            self.state_dict = state_dict

    assert apply(None, [Strong(StateDict(plain))], None) == "fused"
    with pytest.raises(ValueError, match="knows plain LoRA only"):
        apply(None, [StateDict(tensors)], None)


STAGES = """
import torch
from torch import nn


class First(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        x, t, text = inputs
        return x + self.model.to_q(x), text


class Middle(First):
    def forward(self, inputs):
        x, text = inputs
        return self.model.to_out(x) + text, text


class Last(First):
    def forward(self, inputs):
        x, text = inputs
        return self.model.to_q(x)
"""
BASE = """
class BasePipeline:
    def configure_adapter(self, config):
        from peft import inject_adapter_in_model
        inject_adapter_in_model(config, self.transformer)


class Pipeline(BasePipeline):
    def __init__(self, transformer, stages):
        self.transformer, self.stages = transformer, stages

    def to_layers(self):
        return [stage(self.transformer) for stage in self.stages]
"""


class Two(Blocks):
    def __init__(self):
        super().__init__()
        self.to_out = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("module", "t", "expected"),
    [
        ("models.flux", torch.tensor([0.7, 0.7]), 700),
        ("models.wan.wan", torch.tensor([700.0, 700]), 700),
        ("models.lumina_2", torch.tensor([0.7, 0.7]), 300),
    ],
)
def test_pipeline_stages_hand_the_timestep_on(package, module, t, expected):
    """diffusion-pipe's: layers of a pipeline engine, which passes tensors of a tuple only."""
    package("models.base", BASE)
    package(module, STAGES)
    base, stages = importlib.import_module("models.base"), importlib.import_module(module)
    config = TLoraConfig(r=4, min_rank=1, target_modules=["to_q", "to_out"])
    pipeline = base.Pipeline(Two(), [stages.First, stages.Middle, stages.Last])
    pipeline.configure_adapter(config)
    perturb(pipeline.transformer)
    passed = (X.clone(), t, X)
    for layer in pipeline.to_layers():
        assert all(isinstance(element, torch.Tensor) for element in passed)
        passed = layer(passed)
    assert isinstance(passed, torch.Tensor)
    passed.square().sum().backward()
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_lambda" in name:
            assert int((parameter.grad != 0).sum()) == active_rank(expected, 4, 1), name


def test_stages_of_an_unknown_way_of_counting_are_refused(package):
    package("models.base", BASE)
    package("models.cosmos", STAGES)
    stages = importlib.import_module("models.cosmos")
    pipeline = importlib.import_module("models.base").Pipeline(Two(), [stages.First, stages.Last])
    pipeline.configure_adapter(TLoraConfig(r=4, min_rank=1, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"doesn't know how the timesteps of models\.cosmos count"):
        pipeline.to_layers()


def test_the_tables_name_each_host_once():
    assert peft_tlora.timestep_from is timestep_from
    places = [*hosts.FUNCTIONS, *hosts.PLAIN_LOADERS, hosts.PIPELINE]
    assert len(places) == len(set(places))
    assert {place for place, *_ in imports._FINDER.wraps} >= {p.partition(":")[0] for p in places}
