"""A timestep a token or a frame: each layer masks the tokens that it sees."""

import pytest
import torch
from torch import nn

from peft_tlora import active_rank
from peft_tlora.layers import ranks
from peft_tlora.timestep.denoisers import DENOISERS, Denoiser

from .conftest import adapted

TIMES = torch.tensor([[1000, 600, 300, 0], [0, 0, 900, 100]])


class Tokens(nn.Module):
    """(batch, tokens, 8) in and out, with a timestep a token, a frame or a sample."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.add_k_proj = nn.Linear(8, 8)

    def forward(self, x, timestep, text=None):
        out = self.to_q(x)
        return out if text is None else out + self.add_k_proj(text).mean(1, keepdim=True)


DENOISERS["tests:Tokens"] = Denoiser()


def model(**kwargs):
    return adapted(Tokens(), target_modules=["to_q", "add_k_proj"], **kwargs)


def one_by_one(adapted, x, t, repeats=1):
    """Each token run alone with its own timestep."""
    rows = []
    for i, sample in enumerate(x):
        tokens = [adapted(token[None, None], t[i, j // repeats]) for j, token in enumerate(sample)]
        rows.append(torch.cat(tokens, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("repeats", [1, 3])
def test_tokens_of_a_frame_share_its_mask(repeats):
    adapted = model()
    x = torch.randn(2, 4 * repeats, 8)
    expected = one_by_one(adapted, x, TIMES, repeats)
    torch.testing.assert_close(adapted(x, TIMES), expected)


def test_layers_of_other_tokens_take_the_noisiest():
    adapted = model()
    x, text = torch.randn(2, 4, 8), torch.randn(2, 7, 8)
    found = adapted(x, TIMES, text)
    noisiest = TIMES.amax(1)
    whole = [adapted(x, noisiest, text), adapted(x, noisiest)]
    torch.testing.assert_close(found, one_by_one(adapted, x, TIMES) + whole[0] - whole[1])


def test_tokens_that_dont_match_are_refused_by_the_layers_name():
    with pytest.raises(ValueError, match=r"to_q sees 6 tokens, but the timestep has 4"):
        model()(torch.randn(2, 6, 8), TIMES)


def test_each_process_masks_its_own_shard(monkeypatch):
    """What diffusers' ContextParallelConfig does to the tokens, without the processes."""
    adapted = model()
    x = torch.randn(2, 4, 8)
    expected = adapted(x, TIMES)
    state = adapted.base_model.model.to_q.timestep_state
    begin = state.begin_forward
    for part in range(2):
        shard = (part, 2)
        monkeypatch.setattr(state, "begin_forward", lambda t, _, m, s=shard: begin(t, s, m))
        half = adapted(x[:, 2 * part : 2 * part + 2], TIMES)
        torch.testing.assert_close(half, expected[:, 2 * part : 2 * part + 2])
    with pytest.raises(ValueError, match="sees 3 tokens"):
        adapted(x[:, :3], TIMES)


def test_a_layer_without_a_token_axis_takes_the_samples_noisiest(monkeypatch):
    gates = []
    align = ranks.ActiveRanks._align

    def watch(self, *args):
        gates.append(align(self, *args))
        return gates[-1]

    monkeypatch.setattr(ranks.ActiveRanks, "_align", watch)
    adapted = model()
    adapted(torch.randn(2, 8), TIMES)
    expected = active_rank(TIMES.amax(1), 4, 1)
    assert any(gate.tolist() == expected.tolist() for gate in gates)
