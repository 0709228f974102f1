import copy
import functools
import pickle

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from peft_tlora import TLoraConfig, active_rank, timestep_context
from peft_tlora.layers import ranks
from peft_tlora.timestep import recomputation
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser

from .conftest import CONFIG, TinyDenoiser, adapted, perturb, ranks_seen, tiny_unet


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1000),
        torch.tensor(1000.0),
        torch.tensor([1000]),
        torch.tensor([1000, 1000]),
        1000,
        1000.0,
    ],
    ids=["0-d int", "0-d float", "(1,)", "(B,)", "int", "float"],
)
def test_a_timestep_is_read_however_it_is_passed(value):
    model, x = adapted(), torch.randn(2, 3, 8)
    for seen in (ranks_seen(model, x, value), ranks_seen(model, x=x, timestep=value)):
        assert set(seen.values()) == {1}
    assert set(ranks_seen(model, x, value * 0).values()) == {4}


def test_each_sample_has_its_own_mask_and_none_lags_a_step():
    """Rules out the first sample's mask, the batch mean's and the previous forward's."""
    model, x, t = adapted(), torch.randn(3, 2, 8), torch.tensor([1000, 500, 0])
    with torch.no_grad():
        model(x, torch.tensor(777))
        together = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
        first_only = torch.cat([model(x[:1], t[:1]), *(masked_as(model, x, t, i) for i in (1, 2))])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(together, first_only, atol=1e-3)


def masked_as(model, x, t, i):
    """Sample i with the mask of sample 0."""
    with timestep_context(model, t[0]):
        return model(x[i : i + 1], t[i : i + 1])


def test_a_batch_of_classifier_free_guidance_has_the_mask_of_its_samples():
    unet = tiny_unet()
    unet.add_adapter(TLoraConfig(r=4, min_rank=1, target_modules=["to_q", "to_out.0", "conv1"]))
    perturb(unet)
    x, e, t = torch.randn(2, 4, 8, 8), torch.randn(4, 3, 16), torch.tensor([900, 100])
    with torch.no_grad():
        guided = unet(torch.cat([x, x]), torch.cat([t, t]), e).sample
        halves = [unet(x, t, half).sample for half in e.chunk(2)]
    torch.testing.assert_close(guided, torch.cat(halves), atol=1e-5, rtol=1e-4)


class VideoDenoiser(TinyDenoiser):
    """Folds frames into the batch, b-major, as video models do."""

    def forward(self, x, timestep):  # (batch, frames, tokens, features)
        t = timestep.repeat_interleave(x.shape[1])
        return super().forward(x.flatten(0, 1), t).unflatten(0, x.shape[:2])


def test_a_b_major_multiple_of_the_batch_is_matched():
    model, x, t = adapted(VideoDenoiser()), torch.randn(2, 3, 5, 8), torch.tensor([1000, 200])
    with torch.no_grad():
        together = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


class PackingDenoiser(TinyDenoiser):
    """Concatenates the tokens of all samples, so that rows can't be told apart."""

    def forward(self, x, timestep):
        return super().forward(x.flatten(0, 1)[1:], 0 * timestep[:1])


def test_rows_that_match_no_sample_raise_and_name_the_layer():
    model, x = adapted(PackingDenoiser()), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"layer to_q needs one .* 1 rows .* of the 2 samples"):
        model(x, torch.tensor([1000, 200]))
    uniform = ranks_seen(model, x, torch.tensor([1000, 1000]))
    assert set(uniform.values()) == {1}


class TokenDenoiser(TinyDenoiser):
    """Takes a timestep for each token, as Wan 2.2 does."""

    def forward(self, x, timestep):
        noise = torch.tanh(self.to_q(x)) * (timestep[..., None] > 0)
        pooled = x.mean(dim=1, keepdim=True)  # another token axis
        return noise + self.to_out(pooled)


def test_per_token_timesteps_reach_the_tokens_and_the_noisiest_stands_for_the_rest():
    model, x = adapted(TokenDenoiser()), torch.randn(2, 3, 8)
    t = torch.tensor([[0, 1000, 1000], [0, 400, 400]])
    with torch.no_grad():
        output = model(x, t)
        layers = model.base_model.model
        for b, worst in enumerate((1000, 400)):
            for s in range(3):
                with timestep_context(model, t[b, s]):
                    token = torch.tanh(layers.to_q(x[b : b + 1, s : s + 1])) * (t[b, s] > 0)
                with timestep_context(model, worst):
                    pooled = layers.to_out(x[b : b + 1].mean(dim=1, keepdim=True))
                torch.testing.assert_close(
                    output[b, s], (token + pooled)[0, 0], atol=1e-6, rtol=1e-5
                )


# ------------------------------------------------------------------------- gradient checkpointing


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.to_out(torch.tanh(self.to_q(x)))


class DeepDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.checkpoint = lambda function, x: function(x)

    def forward(self, x, timestep):
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return x


DENOISERS["tests:DeepDenoiser"] = Denoiser()


def nested(function, x):
    def outer(x):
        return checkpoint(function, x, use_reentrant=True)

    return checkpoint(outer, x, use_reentrant=True)


CHECKPOINTS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "nested": nested,
}


def plain_call(function, x):
    return function(x)


def gradients(model, run):
    model.zero_grad()
    run(model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4))
HIGH, LOW = torch.tensor([1000, 900]), torch.tensor([100, 300])


def loss(model, t):
    return model(X.clone().requires_grad_(), t).square().sum()


def one_forward(model):
    loss(model, HIGH).backward()


def two_forwards_before_one_backward(model):
    (loss(model, HIGH) + 3 * loss(model, LOW)).backward()


def a_no_grad_forward_in_between(model):
    pending = loss(model, HIGH)
    with torch.no_grad():
        loss(model, LOW)
    pending.backward()


def backward_in_the_opposite_order(model):
    first, second = loss(model, HIGH), loss(model, LOW)
    first.backward()
    second.backward()


def a_failed_forward_in_between(model):
    pending = loss(model, HIGH)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 1, 99), LOW)
    pending.backward()


def a_context_that_ended(model):
    with timestep_context(model, HIGH):
        pending = loss(model, LOW)
    pending.backward()


def backward_inside_another_context(model):
    pending = loss(model, HIGH)
    with timestep_context(model, LOW):
        pending.backward()


def two_contexts(model):
    with timestep_context(model, HIGH):
        first = loss(model, torch.tensor(0))
        with timestep_context(model, LOW):
            second = loss(model, torch.tensor(0))
        (first + second).backward()


def an_intermediate_output(model):
    seen = []
    handle = model.base_model.model.blocks[1].register_forward_hook(
        lambda m, a, out: seen.append(out)
    )
    loss(model, HIGH)
    handle.remove()
    loss(model, LOW)
    seen[0].square().sum().backward()
    for parameter in model.parameters():  # the last block took no part
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


SCENARIOS = [
    one_forward,
    two_forwards_before_one_backward,
    a_no_grad_forward_in_between,
    backward_in_the_opposite_order,
    a_failed_forward_in_between,
    a_context_that_ended,
    backward_inside_another_context,
    two_contexts,
    an_intermediate_output,
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_checkpointed_gradients_equal_plain_ones(scenario, kind):
    model = adapted(DeepDenoiser())
    denoiser = model.base_model.model
    expected = gradients(model, scenario)
    denoiser.checkpoint = CHECKPOINTS[kind]
    found = gradients(model, scenario)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_the_checkpointing_tests_fail_without_the_replay(kind, monkeypatch):
    """What the tests above guard against is real: without the replay the gradients are wrong."""
    model = adapted(DeepDenoiser())
    expected = gradients(model, backward_inside_another_context)
    model.base_model.model.checkpoint = CHECKPOINTS[kind]
    monkeypatch.setattr(recomputation, "backward_sequence_number", lambda: None)
    found = gradients(model, backward_inside_another_context)
    difference = sum((found[n] - expected[n]).norm() for n in expected)
    assert difference > 0.1 * sum(g.norm() for g in expected.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_unets_own_checkpointing_gives_the_plain_gradients(reentrant):
    def run(model):
        x, e = torch.ones(2, 4, 8, 8).requires_grad_(), torch.ones(2, 3, 16).requires_grad_()
        first = model(x, torch.tensor([900, 100]), e).sample.square().mean()
        with torch.no_grad():
            model(x, torch.tensor(500), e)
        second = model(x, torch.tensor([10, 990]), e).sample.square().mean()
        (first + second).backward()

    results = []
    for checkpointing in (False, True):
        unet = tiny_unet()
        unet.requires_grad_(False)
        unet.add_adapter(
            TLoraConfig(
                r=4, min_rank=1, target_modules=["to_q", "to_v", "to_out.0", "conv1"], init_seed=0
            )
        )
        perturb(unet)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing(
                functools.partial(checkpoint, use_reentrant=reentrant)
            )
        results.append(gradients(unet, run))
    assert results[0]
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_a_backward_that_comes_too_late_raises(monkeypatch):
    monkeypatch.setattr(recomputation, "_MAX_PENDING_FORWARDS", 2)
    model = adapted(DeepDenoiser())
    model.base_model.model.checkpoint = CHECKPOINTS["reentrant"]
    pending = [loss(model, HIGH) for _ in range(3)]
    with pytest.raises(RuntimeError, match="More than 2 forwards"):
        pending[0].backward()


# ----------------------------------------------------------------------------- context and state


def test_the_context_wins_over_the_hook_and_the_previous_one_comes_back():
    model, x = adapted(), torch.randn(1, 3, 8)
    clean = torch.tensor(0)
    with timestep_context(model, 1000):
        assert set(ranks_seen(model, x, clean).values()) == {1}
        with timestep_context(model, 500):
            assert set(ranks_seen(model, x, clean).values()) == {2}
        assert set(ranks_seen(model, x, clean).values()) == {1}
    assert set(ranks_seen(model, x, clean).values()) == {4}


def test_an_exception_leaves_nothing_behind():
    model, x = adapted(), torch.randn(1, 3, 8)
    layer = model.base_model.model.to_q
    with pytest.raises(RuntimeError), timestep_context(model, 1000):
        model(torch.randn(1, 3, 9), torch.tensor(900))
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 9), torch.tensor(900))
    assert layer.timestep_state.context is None
    with pytest.warns(UserWarning, match="ran without a timestep"):
        assert layer.timestep_state.current() is None
    assert set(ranks_seen(model, x, torch.tensor(0)).values()) == {4}


def test_a_model_without_time_has_all_ranks_and_obeys_the_context():
    model = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(model, TLoraConfig(r=4, min_rank=1, target_modules=["0"]))
    perturb(model)
    x = torch.randn(2, 8)
    assert set(ranks_seen(model, x).values()) == {4}
    with timestep_context(model, 1000):
        assert set(ranks_seen(model, x).values()) == {1}
    with timestep_context(model.base_model.model[0], 1000):  # any module
        assert set(ranks_seen(model, x).values()) == {1}


class SigmaDenoiser(TinyDenoiser):
    def forward(self, x, sigma):
        return super().forward(x, sigma)


def test_a_denoiser_without_a_known_timestep_warns_once_and_names_the_remedy():
    model, x = adapted(SigmaDenoiser()), torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match=r"SigmaDenoiser ran without .*timestep_context") as caught:
        model(torch.cat([x, x]), torch.tensor(0.5))
    assert len(caught) == 1  # for two layers
    model(x, torch.tensor(0.5))  # warnings are errors


def test_calling_forward_past_the_hook_warns(denoiser):
    model = adapted(denoiser)
    with pytest.warns(UserWarning, match="Call the model itself"):
        denoiser.forward(torch.randn(2, 3, 8), torch.tensor(500))
    del model


def test_the_constant_schedule_needs_no_timestep(denoiser):
    model = adapted(denoiser, rank_schedule="constant")
    denoiser.forward(torch.randn(2, 3, 8), torch.tensor(1000))
    assert set(ranks_seen(model, torch.randn(2, 3, 8), torch.tensor(1000)).values()) == {4}


def test_two_models_share_nothing():
    one, two = adapted(), adapted()
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        alone = two(x, torch.tensor(0))
        with timestep_context(one, 1000):
            assert torch.equal(two(x, torch.tensor(0)), alone)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_have_a_working_hook_and_a_state_of_their_own(copied):
    model, x = adapted(), torch.randn(2, 3, 8)
    with timestep_context(model, 1000):
        twin = copied(model)
    for t in (torch.tensor(0), torch.tensor([1000, 300])):
        assert torch.equal(twin(x, t), model(x, t))
    states = [m.base_model.model.to_q.timestep_state for m in (model, twin)]
    assert states[0] is not states[1]
    assert twin.base_model.model.to_out.timestep_state is states[1]


def edm_timesteps(steps=8):
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def unet_ranks(unet, timesteps):
    x, e = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    seen = [set(ranks_seen(unet, x, t, e).values()) for t in timesteps]
    assert all(len(ranks) == 1 for ranks in seen)
    return [ranks.pop() for ranks in seen]


def adapted_unet(**kwargs):
    unet = tiny_unet()
    unet.add_adapter(
        TLoraConfig(**{**CONFIG, "r": 10, "min_rank": 2, "target_modules": ["to_q"], **kwargs})
    )
    perturb(unet)
    return unet


def test_a_unet_tells_the_timesteps_of_edm_by_their_values():
    timesteps = edm_timesteps()
    assert timesteps[0] > 1
    expected = active_rank(timesteps, 10, 2, timestep_type="log_sigma").tolist()
    assert expected == sorted(expected)
    assert (expected[0], expected[-1]) == (2, 9)
    with pytest.warns(UserWarning, match=r"look like 0\.25 ln\(sigma\)"):
        assert unet_ranks(adapted_unet(), timesteps) == expected
    told = adapted_unet(timestep_type="log_sigma")  # and nobody warns
    assert unet_ranks(told, timesteps) == expected
    with timestep_context(told, timesteps[-1]):
        assert unet_ranks(told, timesteps[:1]) == expected[-1:]


def test_small_timesteps_of_other_schedulers_are_no_log_sigma():
    timesteps = torch.tensor([998.3, 90.7, 1.6, 0.3])  # as karras sigmas have them
    assert unet_ranks(adapted_unet(), timesteps) == active_rank(timesteps, 10, 2).tolist()
    assert unet_ranks(adapted_unet(), torch.tensor([1.0, 0.0])) == [9, 10]
    told = adapted_unet(num_train_timesteps=1.0)
    assert unet_ranks(told, torch.tensor([0.75, 0.25])) == [4, 8]


@pytest.mark.parametrize("value", [torch.tensor([500.0, 0.5]), torch.tensor(-7.0), 500.0])
def test_timesteps_out_of_range_warn_once(value):
    model, x = adapted(num_train_timesteps=1.0), torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match="should be between 0 and 1, but"):
        model(x, value)
    model(x, value)  # and no second time: any warning is an error here


def test_a_timestep_out_of_range_warns_although_later_ones_are_inside():
    model, x = adapted(), torch.randn(2, 3, 8)
    for t in (900, 500, -30):
        model(x, torch.tensor(t))
    with pytest.warns(UserWarning, match="TinyDenoiser got timesteps"):
        model(x, torch.tensor(7))


class OnlyMeta(TorchDispatchMode):
    """Refuses to make a tensor on any other device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, func
        return output


@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_a_step_on_a_device_reads_nothing_and_makes_nothing_on_the_host(shape, ortho):
    """Save for the check of the timesteps' range after 1, 2, 4, 8, ... forwards.

    A tensor on meta has no value: reading it raises.
    """
    model = adapted(ortho_init=ortho)
    for _ in range(8):
        model(torch.randn(2, 3, 8), torch.tensor(3))
    model = model.to("meta")
    x, t = torch.randn(2, 3, 8, device="meta"), torch.zeros(shape, device="meta")
    with OnlyMeta():
        output = model(x, t)
        output.backward(torch.empty_like(output))


def test_the_hook_goes_with_the_adapter(denoiser):
    model = adapted(denoiser)
    assert denoiser._forward_pre_hooks
    model.unload()
    assert not denoiser._forward_pre_hooks
    assert not denoiser._forward_hooks


@pytest.mark.parametrize("inject", ["get_peft_model", "inject_adapter_in_model", "part first"])
def test_the_denoiser_is_found_however_the_adapter_comes_in(inject):
    denoiser, config = DeepDenoiser(), TLoraConfig(**CONFIG)
    if inject == "get_peft_model":
        model = get_peft_model(denoiser, config)
    elif inject == "part first":
        inject_adapter_in_model(config, denoiser.blocks[0], adapter_name="part")
        model = inject_adapter_in_model(config, denoiser)
    else:
        model = inject_adapter_in_model(config, denoiser)
    perturb(model)
    assert len(denoiser._forward_pre_hooks) == 1
    seen = ranks_seen(model, torch.randn(2, 3, 8), torch.tensor(1000))
    assert {rank for name, rank in seen.items() if "part" not in name} == {1}


def test_the_outermost_module_with_a_timestep_is_the_denoiser():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(8, 8)

        def forward(self, x, t):
            return self.to_q(x + t)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = Inner()

        def forward(self, x, timestep):
            return self.denoiser(x, 0 * timestep)  # an embedding, say

    model = adapted(Wrapper(), num_train_timesteps=1000)
    assert set(ranks_seen(model, torch.randn(2, 3, 8), torch.tensor(1000)).values()) == {1}
    assert not model.base_model.model.denoiser._forward_pre_hooks


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("500", TypeError, "number or a tensor"),
        (None, TypeError, "number or a tensor"),
        (True, TypeError, "number or a tensor"),
        (float("nan"), ValueError, "finite"),
    ],
)
def test_a_bad_timestep_raises(value, error, words):
    with pytest.raises(error, match=words), timestep_context(adapted(), value):
        pass


def test_a_context_on_the_wrong_thing_raises():
    with (
        pytest.raises(ValueError, match="Linear has no T-LoRA layer"),
        timestep_context(nn.Linear(2, 2), 0),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"timestep_context\(pipe\.unet, t\)"),
        timestep_context("pipe", 0),
    ):
        pass


def test_a_mask_is_made_once_a_forward_for_all_layers_that_share_it(monkeypatch):
    made = []
    original = ranks.rank_mask
    monkeypatch.setattr(ranks, "rank_mask", lambda *args: made.append(args) or original(*args))
    model = get_peft_model(
        TinyDenoiser(),
        TLoraConfig(
            r=4, target_modules=["time_proj", "to_q", "to_out"], rank_pattern={"time_proj": 1}
        ),
    )
    x = torch.randn(2, 3, 8)
    for t in (torch.tensor([900, 100]), torch.tensor([100, 900])):
        made.clear()
        model(x, t)
        assert len(made) == 2  # of rank 1 and of rank 4
    model.base_model.model.to_q.scaling["default"] = 0.5
    made.clear()
    model(x, torch.tensor([900, 100]))
    assert len(made) == 3
