"""A student with 4-bit weights learns, and its saved model is the trained one once it is quantized again."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rayk
from rayk.config import parse_config
from rayk.run import distill
from tests import runs

pytest.importorskip("torchao")
METHOD = {
    "kind": "custom", "path": "tests.examples.quantized_student:QuantizedStudent", "support": {"kind": "topk", "k": 16},
}  # fmt: skip


@pytest.mark.cluster
@pytest.mark.nightly  # which installs torchao
def test_a_quantized_student_learns_and_is_saved(tmp_path, served, tiny_student):
    from tests.examples.quantized_student import quantize

    values = runs.settings(tmp_path, tiny_student, METHOD, steps=12)
    values["data"]["evaluation"] = values["data"]["train"]
    result = distill(parse_config(values))
    losses = runs.curve(result.output)
    assert losses[-1] < 0.8 * losses[0]
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    batches = rayk.make_batches(str(tmp_path / "rows.jsonl"), tokenizer, batch_size=8)
    model = AutoModelForCausalLM.from_pretrained(result.model).eval()
    full = mean_loss(model, batches)
    quantize(model)
    trained = result.summary["student"]["loss"]
    assert mean_loss(model, batches) == pytest.approx(trained, abs=1e-4)
    assert abs(full - trained) > 1e-3


def mean_loss(model, batches):
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            total += float(torch.nn.functional.cross_entropy(batch.counted(logits), batch.targets, reduction="sum"))
            count += batch.counted_tokens
    return total / count
