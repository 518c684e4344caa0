"""Every path through a model, on tiny models of many architectures, against transformers' own eager forward pass of
each row alone."""

import asyncio
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayk.config import LoraConfig, StudentConfig
from rayk.config.support import Hidden, TopK
from rayk.data.batches import collate
from rayk.engines.base import SamplingParameters
from rayk.engines.speculative import MixedSampling
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.losses import linear_cross_entropy
from rayk.models.kv_cache import can_continue
from rayk.models.layers import cut_model
from rayk.models.lora import add_adapter
from rayk.models.packing import can_pack
from rayk.models.student import check_student, make_model
from rayk.rollouts.teacher_mixed import sample_teacher_mixed
from rayk.training.student import Student, save_model
from tests.architectures import ARCHITECTURES, make_architecture
from tests.engines.reference import assert_correct, assert_logprobs_correct, dense, prompts_of, sequence
from tests.tiny import perturb, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LENGTHS = (17, 4, 9)  # longer than the sliding windows, and on both sides of the start of long rotary embeddings
PACKED = {
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "phi3",
    "phi3_longrope",
    "gpt2",
    "opt",
    "mixtral",
    "olmoe",
    "deepseek_v3",
}
"""The architectures whose rows are packed at these lengths; the others are padded."""
RECURRENT = {"falcon_h1", "qwen3_next", "jamba", "mamba", "rwkv"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / kind
    make_architecture(kind).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return eager(folder)


def eager(folder):
    options = {} if "mamba" in str(folder) or "rwkv" in str(folder) else {"attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def rows():
    return [sequence(length, seed) for seed, length in enumerate(LENGTHS)]


def test_scores_and_hidden_states_are_those_of_each_row_alone(kind, engine, reference):
    assert can_pack(engine.model, max(LENGTHS)) == (kind in PACKED)
    assert_correct(asyncio.run(engine.score(rows(), TopK(8))), reference, rows())
    hidden = asyncio.run(engine.score(rows(), Hidden("float32"))).hidden
    logprobs = engine.head().logits(hidden).log_softmax(1)
    torch.testing.assert_close(logprobs, dense(reference, rows()), atol=1e-4, rtol=0)


def test_generated_log_probs_are_those_of_each_row_alone(kind, engine, reference):
    prompts = prompts_of(*LENGTHS)
    parameters = SamplingParameters(max_new_tokens=6)
    generated = asyncio.run(engine.generate(prompts, parameters, [1, 2, 3]))
    for prompt, completion in zip(prompts, generated, strict=True):
        if kind != "phi3_longrope":
            assert_logprobs_correct(reference, prompt, completion)
            continue
        for step, token in enumerate(completion.token_ids):  # a prefix may be short and the whole row long
            with torch.no_grad():
                ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids[:step]]).astype(np.int64))
                logprobs = reference(input_ids=ids[None], use_cache=False).logits[0, -1].log_softmax(0)
            assert abs(logprobs[token] - completion.logprobs[step]) < 1e-3


def test_teacher_mixed_sampling_is_exact_or_refused_at_the_start(kind, folder, engine, reference):
    config = StudentConfig(model=folder)
    assert can_continue(engine.model) == (kind not in RECURRENT | {"phi3_longrope"})
    if not can_continue(engine.model):
        with pytest.raises(InputError, match="method.teacher_share .* cannot remove tokens from its cache"):
            check_student(config, TOKENIZER, continues=True)
        return
    check_student(config, TOKENIZER, continues=True)
    prompts, vocab_size = prompts_of(*LENGTHS), engine.info.vocab_size
    rollouts = asyncio.run(
        sample_teacher_mixed(
            engine.model,
            engine.verify,
            prompts,
            [1, 2, 3],
            MixedSampling(0.4, 8),
            vocab_size=vocab_size,
            eos_token_ids=[1],
        )
    )
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, rollout.token_ids]).astype(np.int64))
        with torch.no_grad():
            logits = reference(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1, :vocab_size]
        expected = logits.log_softmax(1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.student_logprobs, expected, atol=1e-3)
        np.testing.assert_allclose(rollout.teacher_logprobs, expected, atol=1e-3)


def test_a_training_steps_loss_and_gradient_equal_those_of_plain_forward_passes(folder, reference):
    student = Student(make_model(StudentConfig(model=folder), TOKENIZER, seed=0).train())
    batch = collate(rows(), pad_id=0)
    loss = linear_cross_entropy(student.hidden(batch), student.head, batch.targets).mean()
    loss.backward()
    plain = reference.train()
    plain.zero_grad()
    losses = []
    for row in rows():
        logits = plain(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
        counted = np.flatnonzero(row.counted)
        losses.append(torch.nn.functional.cross_entropy(
            logits[counted - 1], torch.from_numpy(row.targets.astype(np.int64)), reduction="none"
        ))  # fmt: skip
    expected = torch.cat(losses).mean()
    expected.backward()
    plain.eval()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    gradients = {name: each.grad for name, each in student.model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-4, rtol=2e-3)


def test_an_adapter_starts_at_the_base_and_its_merged_model_loads(folder, reference, tmp_path):
    model = make_model(StudentConfig(model=folder, lora={"r": 2}), TOKENIZER, seed=0).eval()
    torch.testing.assert_close(dense(model, rows()), dense(reference, rows()), atol=1e-4, rtol=0)
    perturb(model)
    save_model(model, TOKENIZER, tmp_path / "model")
    expected = dense(model, rows())
    torch.testing.assert_close(dense(eager(tmp_path / "model"), rows()), expected, atol=1e-3, rtol=0)
    assert (expected - dense(reference, rows())).abs().max() > 0.1


def passing_through(forward):
    """A layer's forward pass that returns its hidden states unchanged, in the layer's own form."""

    def unchanged(hidden, *arguments, **options):
        output = forward(hidden, *arguments, **options)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return unchanged


@pytest.mark.parametrize("layers", [2, [0, 1, 3], 4], ids=str)
def test_a_cut_student_skips_the_other_layers_and_loads(kind, folder, layers, tmp_path):
    config = StudentConfig(model=folder, layers=layers)
    if kind == "jamba" and layers == [0, 1, 3]:  # its layers alternate, which the cut ones do not
        with pytest.raises(InputError, match="its layer 3 at place 2 cannot be described"):
            check_student(config, TOKENIZER, continues=False)
        return
    model = make_model(config, TOKENIZER, seed=0)
    save_model(model, TOKENIZER, tmp_path / "model")
    whole = eager(folder)
    kept = [0, 3] if layers == 2 else layers if isinstance(layers, list) else [0, 1, 2, 3]
    stack = next(module for module in whole.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4)
    for number, layer in enumerate(stack):
        if number not in kept:
            layer.forward = passing_through(layer.forward)
    with torch.no_grad():
        expected = torch.cat([
            whole(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None], use_cache=False)
            .logits[0].log_softmax(1)[np.flatnonzero(row.counted) - 1]
            for row in rows()
        ])  # fmt: skip
    torch.testing.assert_close(dense(model, rows()), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(dense(eager(tmp_path / "model"), rows()), expected, atol=1e-4, rtol=0)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {saved.get("num_hidden_layers", len(kept)), saved.get("n_layer", len(kept))} == {len(kept)}


def test_layers_that_no_configuration_describes_are_named():
    model = make_architecture("deepseek_v3")  # the first layers are dense
    with pytest.raises(InputError, match=r"cannot cut name: its layer 3 at place 0 cannot be .* name other layers"):
        cut_model(model, [3, 0], "name")


@pytest.mark.parametrize(
    ("kind", "module", "said"),
    [
        ("qwen3_moe", "gate_proj", "which peft applies to the experts of a mixture"),
        ("mixtral", "w1", "lacks; it has"),
        ("falcon_h1", "out_proj", "whose weights a Mamba kernel reads directly"),
        ("jamba", "dt_proj", "whose weights a Mamba kernel reads directly"),
    ],
)
def test_modules_that_an_adapter_cannot_change_exactly_are_named(kind, module, said):
    with pytest.raises(InputError, match=said):
        add_adapter(make_architecture(kind), LoraConfig(target_modules=["q_proj", module]), 0, "base")
