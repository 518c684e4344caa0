"""`layerwise` equals a dense reference, and learns the same through Serve and Train with any workers, also resumed."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rayk.config import LayerwiseConfig, parse_config
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.losses import relation_divergence
from rayk.methods import Experience, Layerwise
from rayk.methods.layerwise import relation_heads
from rayk.run import distill
from rayk.training.student import LossModule, Student
from tests.methods.small_batch import dense_logits, small_batch
from tests.runs import assert_placement_changes_nothing, curve, metrics, settings, weights
from tests.tiny import tiny_model

PAIRS = [(0, 1), (2, 0)]
RUN = {"kind": "layerwise", "layers": [[0, 1], [0, 0]]}
TED = RUN | {"filters": {"steps": 2}}


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()


def scored(engine, settings, batch):
    signals = asyncio.run(engine.score(batch.sequences, settings.support))
    return Experience(batch, replace(signals, head=engine.head()) if signals.hidden is not None else signals)


def method_for(student, engine, **values):
    settings = LayerwiseConfig(**{"layers": PAIRS, "states": "float32"} | values)
    method = Layerwise(settings, SimpleNamespace(info=engine.info))
    torch.manual_seed(0)
    return method, LossModule(student, method)


def dense_states(model, batch, layers):
    """The outputs of layers other than the last, at the positions that predict the counted tokens."""
    found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    return [batch.counted(found.hidden_states[layer + 1]) for layer in layers]


def real_tokens(probabilities, engine):
    """The probabilities of the real tokens, and that of the padding of the embedding together."""
    size = engine.info.vocab_size
    return torch.cat([probabilities[:, :size], probabilities[:, size:].sum(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_loss_is_that_of_a_dense_reference(engine, teacher, width, distance):
    """Teacher and student with other numbers of layers, with and without a projection; gradients too."""
    batch, pairs = small_batch(), [(0, 0), (1, 0)]
    student = Student(tiny_model(seed=5, layers=3, hidden=width))
    method, module = method_for(
        student, engine, layers=pairs, distance=distance, layer_weight=3.0, hard_label_weight=0.25, temperature=2.0,
        temperature_squared=True,
    )  # fmt: skip
    loss, terms = module(scored(engine, method.settings, batch))
    states = dense_states(student.model, batch, [0, 1])
    [target] = dense_states(teacher, batch, [0])
    if width == 16:
        states = [projection(state) for projection, state in zip(method.modules(), states, strict=True)]
    else:
        assert method.modules() is None
    far = [
        1 - F.cosine_similarity(state, target.detach()) if distance == "cosine"
        else (state - target.detach()).square().mean(dim=1)
        for state in states
    ]  # fmt: skip
    ours, theirs = dense_logits(student.model, batch), dense_logits(teacher, batch).detach()
    log_p, log_q = (real_tokens((logits / 2).softmax(1), engine).log() for logits in (theirs, ours))
    soft = 4 * (log_p.exp() * (log_p - log_q)).sum(1)
    hard = F.cross_entropy(ours, batch.targets, reduction="none")
    expected = 0.25 * hard + 0.75 * soft + 3.0 * (far[0] + far[1]) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["layer_distance_2"], far[1].detach(), rtol=1e-4, atol=1e-5)
    weights = [*module.parameters()]
    for one, other in zip(
        torch.autograd.grad(loss.mean(), weights), torch.autograd.grad(expected.mean(), weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("heads", [None, 4])
def test_relations_are_those_of_queries_keys_and_values(engine, tiny_teacher, heads):
    """Models of other widths; the three divergences are summed, and averaged over the pairs."""
    batch, student = small_batch(), Student(tiny_model(seed=5, layers=3, hidden=16))
    method, module = method_for(
        student, engine, layers=[(0, 1), (2, 0)], distance="attention", relation_heads=heads, layer_weight=2.0,
        hard_label_weight=1.0,
    )  # fmt: skip
    assert method.modules() is None
    loss, terms = module(scored(engine, method.settings, batch))
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    ours, theirs = attention_of(student.model, batch, [0, 2]), attention_of(teacher, batch, [1, 0])
    far = [
        sum(relation_divergence(s, t.detach(), batch.offsets, heads or 1) for s, t in zip(*pair, strict=True))
        for pair in zip(ours, theirs, strict=True)
    ]
    hard = F.cross_entropy(dense_logits(student.model, batch), batch.targets, reduction="none")
    torch.testing.assert_close(loss, hard + far[0] + far[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["layer_distance_2"], far[1].detach(), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert student.model.model.layers[2].self_attn.k_proj.weight.grad.abs().max() > 0


def attention_of(model, batch, layers):
    """Queries, keys and values of layers, at the positions that predict the counted tokens."""
    found = {}
    for number in layers:
        maps = model.model.layers[number].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(maps, name).register_forward_hook(
                lambda _module, _given, output, key=(number, name): found.__setitem__(key, batch.counted(output))
            )
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return [[found[number, name] for name in ("q_proj", "k_proj", "v_proj")] for number in layers]


def test_relation_heads_divide_all_widths(engine):
    student = Student(tiny_model(seed=5, layers=3, hidden=16))
    assert relation_heads(None, ((576, 192, 192), (640, 256, 256))) == 2
    with pytest.raises(InputError, match="relation_heads is 3, but must divide .* 16, 8, 8 in the student, 32, 16, 16"):
        method_for(student, engine, distance="attention", relation_heads=3)
    with pytest.raises(InputError, match="which the teacher's engine does not return"):
        relation_heads(None, ((16, 8, 8), (0, 0, 0)))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_filters_learn_the_task_first_and_are_matched_then(engine, teacher, kind):
    """Both stages equal a dense reference, and only the weights of a stage have gradients."""
    batch = small_batch()
    student = Student(tiny_model(seed=5, layers=3, hidden=16))
    method, module = method_for(
        student, engine, layers=[(1, 0)], hard_label_weight=1.0, filters={"steps": 2, "kind": kind}
    )
    experience, filters = scored(engine, method.settings, batch), method.modules()
    [ours], [theirs] = dense_states(student.model, batch, [1]), dense_states(teacher, batch, [0])
    loss, terms = module(experience)
    expected = [
        F.cross_entropy(norms[0](layer_filters[0](state)) @ teacher.lm_head.weight.T, batch.targets, reduction="none")
        for state, layer_filters, norms in (
            (ours, filters.student, filters.student_norms), (theirs, filters.teacher, filters.teacher_norms)
        )
    ]  # fmt: skip
    torch.testing.assert_close(loss, sum(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["teacher_filter_loss"], expected[1].detach(), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in filters.parameters())
    module.zero_grad()

    method.on_step(2)
    loss, terms = module(experience)
    hard = F.cross_entropy(dense_logits(student.model, batch), batch.targets, reduction="none")
    far = (filters.student[0](ours) - filters.teacher[0](theirs)).square().mean(dim=1)
    torch.testing.assert_close(loss, hard + far, rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in filters.student.parameters())
    rest = (filters.teacher, filters.student_norms, filters.teacher_norms)
    assert all(parameter.grad is None for part in rest for parameter in part.parameters())
    assert student.model.model.embed_tokens.weight.grad.abs().max() > 0


def test_the_stage_is_restored_and_has_its_own_schedule(engine):
    method, _ = method_for(Student(tiny_model(seed=5, layers=3, hidden=16)), engine, filters={"steps": 3})
    method.on_step(4)
    other, _ = method_for(Student(tiny_model(seed=5, layers=3, hidden=16)), engine, filters={"steps": 3})
    other.load_state_dict(method.state_dict())
    assert other.state_dict() == {"step": 4}
    assert method.settings.stage(2, 10) == (2, 3, 1e-3)
    assert method.settings.stage(4, 10) == (1, 7, None)
    assert LayerwiseConfig().stage(4, 10) == (4, 10, None)


@pytest.mark.parametrize("distance", ["mse", "attention"])
def test_micro_batches_and_padding_do_not_change_the_loss(engine, distance):
    batch, student = small_batch(), Student(tiny_model(seed=5, layers=3, hidden=16))
    method, module = method_for(student, engine, distance=distance)
    whole = scored(engine, method.settings, batch)
    parts = torch.cat([module(whole.select([row]))[0] for row in range(batch.rows)])
    torch.testing.assert_close(module(whole)[0], parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["mse", "attention"])
def test_an_equal_teacher_has_no_distance(engine, tiny_teacher, distance):
    batch, student = small_batch(), Student(AutoModelForCausalLM.from_pretrained(tiny_teacher))
    method, module = method_for(student, engine, layers=2, distance=distance, hard_label_weight=0.0)
    assert module(scored(engine, method.settings, batch))[0].abs().max() < 1e-4


def test_without_a_soft_loss_only_layers_are_sent(engine):
    batch, student = small_batch(), Student(tiny_model(seed=5, layers=3, hidden=16))
    method, module = method_for(student, engine, hard_label_weight=1.0, layer_weight=0.0)
    experience = scored(engine, method.settings, batch)
    assert experience.signals.hidden is None
    loss, _ = module(experience)
    hard = F.cross_entropy(dense_logits(student.model, batch), batch.targets, reduction="none")
    torch.testing.assert_close(loss, hard, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [{"name": "t", "model": "t", "engine": {"kind": "vllm"}}]}, "vLLM engine returns no states"),
        ({"teachers": [{"name": "t", "model": "t", "engine": {"kind": "simulated"}}]}, "has no support 'layers'"),
        ({"training": {"compile": True}}, "set training.compile to false"),
        ({"method": {"kind": "layerwise", "relation_heads": 2}}, "with 'distance: attention' only"),
        ({"method": {"kind": "layerwise", "distance": "attention", "filters": {"steps": 1}}}, "leave them out"),
        ({"ensemble": {}, "teachers": [{"name": "t", "model": "t"}, {"name": "u", "model": "u"}]}, "one teacher"),
        ({"method": {"kind": "layerwise", "divergence": "decoupled_kl"}}, "choose another one"),
        ({"method": {"kind": "layerwise", "alignment": {"kind": "bytes"}}}, "needs a teacher with the student's"),
        ({"method": {"kind": "logit_kd", "support": {"kind": "layers"}}}, "cannot learn from support 'layers'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    run = {
        "teachers": [{"name": "t", "model": "t"}], "student": {"model": "s"}, "data": {"train": {"path": "rows.jsonl"}},
        "method": {"kind": "layerwise"},
    }  # fmt: skip
    parse_config(run)
    with pytest.raises(InputError, match=message):
        parse_config(run | changes)


def prepared(folder, student, method=RUN, **training):
    folder.mkdir()
    return parse_config(settings(folder, student, method, **{"steps": 4} | training))


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "sharding"), [(RUN, "none"), (TED, "none"), (TED, "fsdp")], ids=["projections", "filters", "sharded"]
)
def test_two_workers_and_a_resumed_run_learn_the_same(tmp_path, tiny_student, served, monkeypatch, method, sharding):
    """Through the served teacher's wire; projections and filters are in the checkpoints, the last one of which is that
    between the stages."""

    def make(name, **training):
        if name == "two":
            training |= {"sharding": sharding}
        return prepared(tmp_path / name, tiny_student, method, **training)

    run = assert_placement_changes_nothing(make, "layerwise", at=3, every=2, monkeypatch=monkeypatch)
    rows = metrics(run)
    first_stage = ["student_filter_loss" in row for row in rows]
    assert first_stage == [step < 2 and "filters" in method for step in range(4)]
    assert ["layer_distance" in row for row in rows] == [not filters for filters in first_stage]
    if "filters" not in method:
        assert rows[-1]["layer_distance"] < rows[0]["layer_distance"]


def test_a_run_learns_the_teachers_relations(tmp_path, tiny_student, served):
    method = RUN | {"distance": "attention", "hard_label_weight": 1.0, "layer_weight": 1e4}
    run = prepared(tmp_path / "run", tiny_student, method, steps=20)
    distill(run)
    distances = curve(run.output_path, "layer_distance")
    assert np.mean(distances[-3:]) < 0.5 * np.mean(distances[:3])


def test_the_first_stage_leaves_the_student_as_it_is(tmp_path, tiny_student, served):
    """Weight decay would change it; the second stage has a learning rate that changes nothing."""
    method = TED | {"filters": {"steps": 3, "learning_rate": 1e-2}}
    run = prepared(tmp_path / "run", tiny_student, method, weight_decay=1.0, learning_rate=1e-15)
    distill(run)
    before, after = load_file(f"{tiny_student}/model.safetensors"), weights(run.output_path)
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, atol=1e-7, err_msg=name)
    assert curve(run.output_path, "learning_rate") == pytest.approx([1e-2, 0.75e-2, 0.25e-2, 1e-15])


def test_layers_that_a_model_lacks_are_refused_at_the_start(tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, {"kind": "layerwise", "layers": 2})
    values["teachers"] = [{"name": "t", "model": tiny_teacher}]
    with pytest.raises(InputError, match="2 layers are to be matched, but the student has only 1; lower method.layers"):
        distill(parse_config(values))
    with pytest.raises(InputError, match="Layer 2 is to be matched, but teacher 't' has only layers 0 to 1"):
        distill(parse_config(values | {"method": {"kind": "layerwise", "layers": [[0, 2]]}}))
    values["method"] = {"kind": "layerwise", "layers": 1, "filters": {"steps": 6}}
    with pytest.raises(InputError, match="filters.steps is 6, but the run has only 6 steps"):
        distill(parse_config(values))
