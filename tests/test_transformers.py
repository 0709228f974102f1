"""Models without time: every rank is active, and everything of PEFT's works."""

import json
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_tlora import TLoraConfig

from .conftest import perturb

pytestmark = pytest.mark.upstream

# names of older versions that transformers has deprecated, one of which PEFT asks for
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
IDS = torch.tensor([[1, 5, 7, 2], [1, 3, 9, 2]])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
        )
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def vit():
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )


PIXELS = torch.ones(2, 3, 8, 8)
CASES = {
    "llama": (llama, "CAUSAL_LM", None, {"input_ids": IDS}),
    "llama, all-linear": (llama, "CAUSAL_LM", "all-linear", {"input_ids": IDS}),
    "bert": (bert, "SEQ_CLS", ["query", "value", "word_embeddings"], {"input_ids": IDS}),
    "vit": (vit, None, r".*\.(q_proj|v_proj|query|value)", {"pixel_values": PIXELS}),
    "t5": (t5, "SEQ_2_SEQ_LM", None, {"input_ids": IDS, "labels": IDS}),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def build(case):
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def adapted(case, **fields):
    _, task_type, targets, _ = CASES[case]
    config = TLoraConfig(
        **{"r": 4, "min_rank": 1, "task_type": task_type, "target_modules": targets, **fields}
    )
    model = get_peft_model(build(case), config).eval()
    perturb(model)
    return model


@torch.no_grad()
def logits(model, case):
    return model(**CASES[case][3]).logits


@each_case
def test_train_save_load_merge_without_a_timestep_or_a_warning(tmp_path, case):
    model = adapted(case)
    assert not torch.allclose(logits(model, case), logits(build(case), case), atol=1e-3)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**CASES[case][3]).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    expected = logits(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(case), tmp_path).eval()
    assert torch.equal(logits(loaded, case), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, case), expected, atol=1e-4, rtol=1e-4)


@each_case
def test_all_ranks_are_active(case):
    """The update is that of the same adapter with the constant schedule."""
    model, constant = adapted(case), adapted(case, rank_schedule="constant")
    constant.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_schedule" not in k}, strict=False
    )
    assert torch.equal(logits(model, case), logits(constant, case))


@each_case
def test_gradient_checkpointing_and_generation(case):
    model = adapted(case).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**CASES[case][3]).logits.float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    if case in ("llama", "t5"):
        tokens = model.eval().generate(input_ids=IDS, max_new_tokens=3, num_beams=2)
        assert len(tokens) == 2


def test_an_adapter_folder_alone_is_enough_for_the_auto_classes(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = TLoraConfig(r=4, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    # without a task type the class of the base is in the adapter's config
    config = TLoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    model.save_pretrained(tmp_path / "no task")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "no task").eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "no task"), TLoraConfig)


def test_without_the_import_the_error_and_the_file_name_what_is_missing(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["library_name"] == "peft_tlora"
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().endswith("KeyError: 'TLORA'")
