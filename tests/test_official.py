"""The authors' files against what their layers compute; tests/references/official.py wrote both."""

import json
from pathlib import Path

import pytest
import torch

from peft_tlora.formats import TrainingFacts, read_adapter

HERE = Path(__file__).parent / "references"
REFERENCE = json.loads((HERE / "official.json").read_text())
SDXL = TrainingFacts(min_rank=1, rank_schedule="power", schedule_exponent=1.5)
FLUX = TrainingFacts(min_rank=1, rank_schedule="power")
FILES = {
    "official_sdxl_vanilla.safetensors": (SDXL, 1),
    "official_sdxl_ortho.safetensors": (SDXL, 1),
    "official_flux.pt": (FLUX, 1000),
}
NAMES = {"to_out": "to_out.0", "to_q_proj": "add_q_proj"}


@pytest.mark.parametrize("file", FILES)
def test_a_layer_adds_what_the_authors_layer_adds_at_each_timestep(file):
    facts, divisor = FILES[file]
    adapter = read_adapter(HERE / file, facts=facts, allow_pickle=True)
    seen, ranks = set(), set()
    for theirs, entry in REFERENCE[file].items():
        block, _, target = theirs.partition(".processor.")
        if block.startswith("single") and target == "to_out":
            continue  # the authors' processor never calls it
        name = f"{block}.{NAMES.get(target, target)}"
        layer = adapter.layers[name]
        seen.add(name)
        x = torch.tensor(entry["x"], dtype=torch.float64)
        for t, expected in entry["added"].items():
            active = layer.schedule.active_rank(int(t) / divisor)
            ranks.add(active)
            found = layer.delta(active).double() @ x
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert seen == set(adapter.layers)
    assert ranks == {1, 2, 3, 4}
