"""add_weighted_adapter: what keeps the mask of every timestep, and what is refused."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_tlora import TLoraConfig, timestep_context

from .conftest import TinyDenoiser, perturb, tiny_unet

TIMES = (0, 250, 500, 750, 1000)
FACTORED = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SPLIT = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


def model(base=None, targets=("to_q", "to_out"), alphas=(6, 3), **fields):
    """Adapters "one" on two layers and "two" on the first of them."""
    fields = {"r": 4, "min_rank": 1, **fields}
    a = TLoraConfig(target_modules=list(targets), lora_alpha=alphas[0], **fields)
    b = TLoraConfig(target_modules=list(targets[:1]), lora_alpha=alphas[1], **fields)
    torch.manual_seed(0)
    peft_model = get_peft_model(base or TinyDenoiser(), a, adapter_name="one").eval()
    peft_model.add_adapter("two", b)
    perturb(peft_model)
    return peft_model


def options(combination_type):
    needs = combination_type.startswith(("ties", "dare", "magnitude"))
    return {"combination_type": combination_type, **({"density": 0.7} if needs else {})}


def deltas(peft_model, t):
    """The update of each adapter in each layer at a timestep."""
    with torch.no_grad(), timestep_context(peft_model, t):
        return {
            name: {adapter: layer.get_delta_weight(adapter) for adapter in layer.lora_A}
            for name, layer in peft_model.named_modules()
            if isinstance(layer, LoraLayer) and layer.lora_A
        }


def assert_is_the_sum(peft_model, adapter, weights, times=TIMES, atol=1e-5):
    for t in times:
        for updates in deltas(peft_model, t).values():
            expected = sum(w * updates[name] for name, w in weights.items() if name in updates)
            torch.testing.assert_close(updates[adapter], expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("ortho", ["last", None])
@pytest.mark.parametrize("base", [TinyDenoiser, tiny_unet])
def test_cat_is_the_exact_sum_at_every_timestep(base, ortho):
    targets = ("to_q", "to_out") if base is TinyDenoiser else ("conv1", "to_q")
    peft_model = model(base(), targets, ortho_init=ortho, min_rank=0.3, use_rslora=True)
    before = copy.deepcopy(peft_model.state_dict())
    peft_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
    assert_is_the_sum(peft_model, "sum", {"one": 0.7, "two": -0.4})
    after = peft_model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert peft_model.peft_config["one"].r == 4
    columns = 2 if ortho else 1
    combined = peft_model.peft_config["sum"]
    assert (combined.r, combined.rank_multiple) == (8 * columns, 2 * columns)


@pytest.mark.parametrize("weight", [0.7, -1.3])
def test_one_adapter_is_scaled_at_every_timestep(weight):
    peft_model = model()
    peft_model.add_weighted_adapter(["one"], [weight], "scaled")
    assert_is_the_sum(peft_model, "scaled", {"one": weight})


@pytest.mark.parametrize("combination_type", ["cat", *FACTORED])
def test_a_factored_combination_goes_through_a_file_and_keeps_its_mask(tmp_path, combination_type):
    peft_model = model(targets=("to_q",))
    peft_model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", **options(combination_type))
    peft_model.set_adapter("new")
    layer = peft_model.base_model.model.to_q
    groups = layer.r["new"] // 4
    for t, rank in ((0, 4), (500, 2), (1000, 1)):
        delta = deltas(peft_model, t)["base_model.model.to_q"]["new"]
        up, down = (each["new"].weight[...] for each in (layer.lora_B, layer.lora_A))
        active = rank * groups
        expected = layer.scaling["new"] * up[:, :active] @ down[:active]
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)
    peft_model.save_pretrained(tmp_path, selected_adapters=["new"])
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(TinyDenoiser(), tmp_path / "new").eval()
    x = torch.randn(2, 3, 8)
    for t in TIMES:
        torch.testing.assert_close(
            loaded(x, torch.tensor(t)), peft_model(x, torch.tensor(t)), rtol=0, atol=0
        )


def test_linear_is_pefts_combination_of_the_masked_adapters():
    """Vanilla adapters cut to the active ranks by hand, in a model without time."""
    peft_model = model(targets=("to_q",), ortho_init=None)
    cut = copy.deepcopy(peft_model)
    for each in (peft_model, cut):
        layer = each.base_model.model.to_q
        for adapter in ("one", "two"):
            if each is cut:
                layer.lora_A[adapter].weight.data[2:] = 0
        each.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", combination_type="linear")
    masked = deltas(peft_model, 500)["base_model.model.to_q"]["new"]
    expected = deltas(cut, 0)["base_model.model.to_q"]["new"]
    torch.testing.assert_close(masked, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("combination_type", SPLIT)
def test_what_mixes_the_ranks_needs_a_chosen_mask(combination_type):
    peft_model = model(alphas=(4, 4))  # PEFT before 0.21 multiplies the scaling in twice
    with pytest.raises(
        ValueError, match=rf"every timestep: .*{combination_type}.*timestep_context"
    ):
        peft_model.add_weighted_adapter(
            ["one", "two"], [1.0, 1.0], "new", **options(combination_type)
        )
    assert "new" not in peft_model.peft_config
    with timestep_context(peft_model, 1000):
        peft_model.add_weighted_adapter(
            ["one", "two"], [1.0, 1.0], "new", **options(combination_type), svd_rank=4
        )
    assert peft_model.peft_config["new"].rank_schedule == "constant"
    if combination_type == "svd":  # rank 1 is active in each, of 2 columns
        chosen = deltas(peft_model, 1000)
        for t in TIMES:
            for name, updates in deltas(peft_model, t).items():
                expected = sum(chosen[name][each] for each in ("one", "two") if each in updates)
                torch.testing.assert_close(updates["new"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "second",
    [{"r": 8}, {"min_rank": 2}, {"rank_schedule": "cosine"}, {"rank_pattern": {"to_q": 8}}],
)
def test_adapters_whose_masks_differ_need_a_chosen_mask(second):
    peft_model = model(targets=("to_q",))
    fields = {"r": 4, "min_rank": 1, "target_modules": ["to_q"], **second}
    peft_model.add_adapter("three", TLoraConfig(**fields, init_lora_weights=False))
    with pytest.raises(ValueError, match="their ranks or their schedules differ"):
        peft_model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "new", combination_type="cat")
    with timestep_context(peft_model, 400):
        peft_model.add_weighted_adapter(["one", "three"], [1.0, 0.5], "new", combination_type="cat")
    expected = deltas(peft_model, 400)["base_model.model.to_q"]
    for t in TIMES:
        updates = deltas(peft_model, t)["base_model.model.to_q"]
        torch.testing.assert_close(
            updates["new"], expected["one"] + 0.5 * expected["three"], atol=1e-5, rtol=1e-5
        )


def test_a_model_without_time_combines_as_lora_does():
    base = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    config = TLoraConfig(r=4, lora_alpha=4, target_modules=["0", "1"], init_lora_weights=False)
    peft_model = get_peft_model(base, config, adapter_name="one")
    peft_model.add_adapter("two", config)
    for combination_type in ("svd", "cat"):
        peft_model.add_weighted_adapter(
            ["one", "two"], [0.7, 0.4], combination_type, combination_type, svd_rank=8
        )
        for layer in (peft_model.base_model.model[0], peft_model.base_model.model[1]):
            expected = 0.7 * layer.get_delta_weight("one") + 0.4 * layer.get_delta_weight("two")
            found = layer.get_delta_weight(combination_type)
            if combination_type == "cat" or isinstance(layer.get_base_layer(), nn.Embedding):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_failed_combination_leaves_the_adapters_as_they_were():
    peft_model = model(targets=("to_q",))
    before = copy.deepcopy(peft_model.state_dict())
    x, t = torch.randn(2, 3, 8), torch.tensor(700)
    expected = peft_model(x, t)
    with pytest.raises(ValueError, match="Invalid combination_type: mean"):
        peft_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", combination_type="mean")
    with pytest.raises(ValueError, match="Adapter nine does not exist"):
        peft_model.add_weighted_adapter(["one", "nine"], [1.0, 1.0], "new")
    assert torch.equal(peft_model(x, t), expected)
    after = peft_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_model_that_never_had_a_timestep_combines_as_lora_does():
    class NoTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(8, 8)

        def forward(self, x):
            return self.to_q(x)

    config = TLoraConfig(r=4, min_rank=1, target_modules=["to_q"])
    peft_model = get_peft_model(NoTime(), config, "one")
    peft_model.add_adapter("two", config)
    perturb(peft_model)
    peft_model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "free", combination_type="svd")
    with timestep_context(peft_model, 500):  # it is a denoiser after all
        peft_model(torch.randn(2, 8))
    with pytest.raises(ValueError, match="can't be combined with a mask for every timestep"):
        peft_model.add_weighted_adapter(["one", "two"], [1, 0.5], "no", combination_type="svd")


def test_an_svd_to_more_ranks_than_a_layer_has_works_as_in_peft():
    base = nn.Sequential(nn.Linear(8, 3))
    config = TLoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    peft_model = get_peft_model(base, config, adapter_name="one")
    peft_model.add_adapter("two", config)
    peft_model.add_weighted_adapter(
        ["one", "two"], [0.7, 0.4], "new", svd_rank=5, svd_full_matrices=False
    )
    layer = peft_model.base_model.model[0]
    expected = 0.7 * layer.get_delta_weight("one") + 0.4 * layer.get_delta_weight("two")
    torch.testing.assert_close(layer.get_delta_weight("new"), expected, atol=1e-5, rtol=1e-5)
    peft_model.set_adapter("new")
    x = torch.randn(4, 8)
    torch.testing.assert_close(
        peft_model(x) - base[0].base_layer(x), x @ expected.T, atol=1e-5, rtol=1e-5
    )
