"""Settings are checked when they are loaded, and each error is one sentence that says what to change."""

import re

import pytest
import yaml

import rayk
from rayk.config import (
    PolicyEngineConfig,
    RunConfig,
    TeacherConfig,
    TransformersEngineConfig,
    VLLMEngineConfig,
    VLLMPolicyEngineConfig,
    load_config,
    parse_config,
)
from rayk.config.support import Logprob
from rayk.errors import InputError

MINIMAL = {
    "teachers": [{"name": "big", "model": "models/big"}],
    "student": {"model": "models/small"},
    "data": {"train": {"path": "rows.jsonl"}},
    "method": {"kind": "logit_kd"},
}


def write(path, values):
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def changed(**places):
    """`MINIMAL` with values at places written `a__b`."""
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for place, value in places.items():
        *parents, last = place.split("__")
        inside = values
        for part in parents:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return values


def on_vllm(**engine):
    return {"kind": "served", "engine": {"kind": "vllm", **engine}}


def test_resolved_settings_can_be_loaded_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_config(
        changed(
            method={"kind": "logit_kd", "temperature": 2.0, "divergence": {"name": "jensen_shannon", "beta": 0.3}},
            training__betas=[0.8, 0.99],
            evaluation__answer_pattern="#### (.+)",
            data__evaluation={"path": "ä.jsonl"},
        )
    )
    again = load_config(write(tmp_path / "run.yaml", settings.to_yaml()))
    assert again == settings
    assert again.to_yaml() == settings.to_yaml()


def test_missing_settings_get_their_defaults():
    settings = parse_config(MINIMAL)
    assert settings.training.epochs == 1.0
    assert settings.method.support.k == 64
    assert settings.output_path.parts[-2:] == ("runs", "run")


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.warmup_steps=7", "training.warmup_steps", 7),
        ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
        ("teachers.0.replicas=3", "teachers.0.replicas.max", 3),
        ("teachers.0.replicas.max=4", "teachers.0.replicas.max", 4),
        ("data.evaluation.path=e.jsonl", "data.evaluation.path", "e.jsonl"),
        ("evaluation.generation={max_new_tokens: 3}", "evaluation.generation.max_new_tokens", 3),
        ("name=a=b", None, "a=b"),
        ("method.divergence=reverse_kl", "method.divergence.name", "reverse_kl"),
    ],
)
def test_overrides_reach_every_place(tmp_path, override, place, value):
    # A resolved config has every section, the unset ones as null.
    resolved = yaml.safe_load(parse_config(changed(data__evaluation={"path": "d.jsonl"})).to_yaml())
    for number, values in enumerate((changed(data__evaluation=None), resolved)):
        path = write(tmp_path / f"{number}.yaml", values)
        if place is None:
            with pytest.raises(InputError, match=re.escape(value)):
                load_config(path, [override])
            continue
        overrides = [override, *(["data.evaluation.path=d.jsonl"] if "generation" in override else [])]
        found = load_config(path, overrides).model_dump(mode="json")
        for part in place.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert found == value


@pytest.mark.parametrize(
    "override", ["training.steps", "=3", "teachers.5.name=x", "seed.deep=x", "teachers.a.name=x", "a=[1"]
)
def test_an_override_without_a_place_is_named_in_the_error(tmp_path, override):
    with pytest.raises(InputError, match="^" + re.escape(f"--set {override}: ")) as caught:
        load_config(write(tmp_path / "run.yaml", changed(seed=1)), [override])
    assert "\n" not in str(caught.value)


def test_an_override_of_a_list_says_that_its_items_are_numbered(tmp_path):
    path = write(tmp_path / "run.yaml", changed(teachers=[{"model": "m"}]))
    with pytest.raises(InputError, match=r"--set teachers\.model=x: .*are numbered, as in teachers\.0\.model\.$"):
        load_config(path, ["teachers.model=x"])


WRONG = {
    "misspelt key": (changed(trainng={}), "unknown key 'trainng'; did you mean 'training'?"),
    "misspelt key inside": (changed(training__step=1), "training: unknown key 'step'; did you mean 'steps'?"),
    "misspelt key of a kind": (changed(method__temprature=2), "unknown key 'temprature'; did you mean 'temperature'?"),
    "misspelt key of a support": (changed(method__support={"kind": "topk", "kk": 2}), "support: unknown key 'kk'"),
    "key without similar ones": (changed(student__xyzzy=1), "student: unknown key 'xyzzy'; Allowed: model, config,"),
    "unknown method": (changed(method__kind="logit_kt"), "method: unknown kind 'logit_kt'; did you mean 'logit_kd'?"),
    "no kind": (changed(method={"temperature": 2}), "method needs a 'kind'"),
    "unknown support": (changed(method__support={"kind": "top"}), "unknown kind 'top'; did you mean 'topk'?"),
    "unknown divergence": (changed(method__divergence="forward"), "'forward'; did you mean 'forward_kl'?"),
    "divergence option": (changed(method__divergence={"name": "forward_kl", "beta": 0.5}), "takes no 'beta'"),
    "missing": (changed(data={}), "data.train is missing; set it."),
    "wrong type": (changed(training__steps="many"), "training.steps is 'many', but must be an integer"),
    "out of range": (changed(training__learning_rate=0), "training.learning_rate: input should be greater than 0"),
    "no teacher": (changed(teachers=[]), "'logit_kd' needs a teacher"),
    "on_policy without teacher": (changed(teachers=[], method={"kind": "on_policy"}), "'on_policy' needs a teacher"),
    "adaptive without evaluation": (
        changed(method={"kind": "on_policy", "adaptive": {}}),
        "method.adaptive needs the evaluation loss; set data.evaluation",
    ),
    "rollouts of a method without them": (
        changed(rollouts={}), "rollouts is set, but method 'logit_kd' samples nothing; leave it out"
    ),
    "unknown kind of rollouts": (changed(rollouts={"kind": "serve"}), "unknown kind 'serve'; did you mean 'served'?"),
    "unknown key of rollouts": (
        changed(rollouts={"staleness": 1}), "unknown key 'staleness'; did you mean 'max_staleness'?"
    ),
    "key of another kind of rollouts": (
        changed(method={"kind": "on_policy"}, rollouts={"replicas": 2}), "rollouts: unknown key 'replicas'"
    ),
    "key of a teacher's vLLM in a policy's": (
        changed(method={"kind": "on_policy"}, rollouts=on_vllm(dtype="float32")), "unknown key 'dtype'"
    ),
    "argument that vLLM's replica sets": (
        changed(method={"kind": "on_policy"}, rollouts=on_vllm(arguments={"load_format": "auto"})),
        "'load_format' is set by the policy's replica; leave it out",
    ),
    "temperature above vLLM's limit": (
        changed(method={"kind": "on_policy"}, rollouts=on_vllm() | {"temperature": 2.5}),
        "rollouts.temperature is 2.5, but vLLM samples at temperatures from 0.01 to 2",
    ),
    "policy gradient with vLLM in bfloat16": (
        changed(
            method={"kind": "minillm", "teacher_share": 0}, rollouts=on_vllm(), training={"precision": "bfloat16"}
        ),
        "use rollouts.engine.kind 'transformers', or training.precision and student.dtype 'float32'",
    ),
    "range of workers": (
        changed(training__workers={"min": 3, "max": 2}), "run.yaml: training.workers: min (3) is larger than max (2)"
    ),
    "number of workers": (changed(training__workers="two"), "training.workers is 'two', but must be an integer"),
    "batch that is no multiple of the samples": (
        changed(method={"kind": "on_policy"}, rollouts={"samples": 3}), "must be a multiple of rollouts.samples (3)"
    ),
    "samples of rows with their own completion": (
        changed(method={"kind": "on_policy", "student_fraction": 0.5}, rollouts={"samples": 2}),
        "set method.student_fraction to 1",
    ),
    "deadline of the rollouts": (
        changed(method={"kind": "on_policy"}, rollouts={"kind": "served", "deadline_seconds": 1800}),
        "rollouts.deadline_seconds must be below training.collective_timeout_seconds (1800)",
    ),
    "timeout of the rollouts": (
        changed(method={"kind": "on_policy"}, rollouts={"timeout_seconds": 1800}),
        "rollouts.timeout_seconds must be below training.collective_timeout_seconds (1800)",
    ),
    "teacher-mixed sampling with a served policy": (
        changed(method={"kind": "minillm"}, rollouts={"kind": "served"}),
        "method.teacher_share samples from student and teacher together",
    ),
    "an ensemble that generates": (
        changed(
            teachers=[{"name": "a", "model": "a"}, {"name": "b", "model": "b"}], ensemble={},
            method={"kind": "on_policy", "teacher_written": 0.5},
        ),
        "method.teacher_written needs one teacher that generates",
    ),
    "reference that is no teacher": (
        changed(teachers=[], method={"kind": "preference", "reference": "big"}),
        "method.reference 'big' is none of the teachers (there are none)",
    ),
    "reference beside a route": (
        changed(method={"kind": "preference", "reference": "big"}, route={"field": "a", "teachers": {"x": "big"}}),
        "method.reference names one teacher, but 'ensemble' or 'route' is set",
    ),
    "reference without signals": (
        changed(
            teachers=[{"name": "big", "model": "m", "engine": {"kind": "openai"}}],
            method={"kind": "preference", "reference": "big"},
        ),
        "teacher 'big': engine kind 'openai' generates text and gives no signals",
    ),
    "rows that are not pairs": (
        changed(method={"kind": "preference"}, data__train__format="messages"),
        "data.train.format is 'messages', but method 'preference' learns from pairs of answers; leave it out",
    ),
    "beta": (changed(method={"kind": "preference", "beta": 0}), "method.beta: input should be greater than 0"),
    "smoothing": (changed(method={"kind": "preference", "label_smoothing": 0.5}), "label_smoothing: input should be"),
    "unknown teacher": (changed(method__teacher="small"), "method.teacher 'small' is none of the teachers (big)"),
    "two teachers of one name": (changed(teachers=[{"model": "a"}, {"model": "b"}]), "two share a name"),
    "teacher without model": (changed(teachers=[{"name": "x"}]), "teachers.0 needs 'model'"),
    "model and config of a student": (changed(student__config="x"), "student needs exactly one of 'model'"),
    "steps and epochs": (
        changed(training={"steps": 1, "epochs": 1}),
        "training: give 'steps' or 'epochs', not both; set the other to null",
    ),
    "fewer rows than workers": (
        changed(training={"workers": 4, "batch_size": 2}), "'batch_size' (2) is below 'workers' (4)"
    ),
    "deadline": (changed(training__collective_timeout_seconds=10), "deadline_seconds must be below"),
    "pattern": (changed(evaluation__answer_pattern="("), "evaluation.answer_pattern is not a regular expression"),
    "groups": (changed(evaluation__answer_pattern="#"), "evaluation.answer_pattern needs exactly one group, it has 0"),
    "generation without rows": (
        changed(evaluation__generation={}), "evaluation.generation needs rows: set data.evaluation"
    ),
    "replicas": (changed(teachers=[{"model": "a", "replicas": {"min": 3, "max": 2}}]), "min (3) is larger than max"),
    "logprob": (changed(method__support={"kind": "logprob"}), "cannot learn from support 'logprob'; use 'topk'"),
    "unknown engine": (changed(teachers=[{"model": "a", "engine": {"kind": "vlm"}}]), "'vlm'; did you mean 'vllm'?"),
    "misspelt key of an engine": (
        changed(teachers=[{"model": "a", "engine": {"dtpe": 1}}]), "engine: unknown key 'dtpe'; did"
    ),
    "key of another engine": (
        changed(teachers=[{"model": "a", "engine": {"kind": "vllm", "threads": 1}}]), "unknown key 'threads'"
    ),
    "value of an engine": (
        changed(teachers=[{"model": "a", "engine": {"kind": "vllm", "max_model_len": 1}}]), "max_model_len: input"
    ),
    "list in place of a section": (changed(training=[1]), "training is [1], but must be a section, such as {"),
    "kind in place of a section": (changed(method__alignment="bytes"), "is 'bytes', but must be a section, such as"),
    "kind in place of a support": (changed(method__support="topk"), "is 'topk', but must be a section, such as {kind"),
    "text in place of options": (
        changed(teachers=[{"model": "a", "engine": {"kind": "vllm", "arguments": "x"}}]),
        "arguments is 'x', but must be a mapping",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_each_wrong_setting_is_one_sentence(tmp_path, values, sentence):
    path = write(tmp_path / "run.yaml", values)
    with pytest.raises(InputError) as caught:
        load_config(path)
    message = str(caught.value)
    assert sentence in message
    assert message.startswith(f"{path}: ")
    assert message.endswith((".", "?"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty or contains no settings"),
        ("- 1", "contains no settings"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_file_without_settings_is_named(tmp_path, text, sentence):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(InputError, match=sentence) as caught:
        load_config(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_an_unreadable_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / name)


def test_preference_uses_a_teacher_only_as_named_reference():
    without = parse_config(changed(teachers=[], method={"kind": "preference"}))
    unused, named = (parse_config(changed(method={"kind": "preference"} | more)) for more in ({}, {"reference": "big"}))
    assert (without.method.support, unused.method.support, named.method.support) == (None, None, Logprob())
    assert (without.evaluation_teacher, unused.evaluation_teacher, named.evaluation_teacher) == ("", "big", "big")
    for settings in (without, unused, named):
        assert parse_config(settings.model_dump(mode="json")) == settings


def test_a_number_of_replicas_sets_minimum_and_maximum():
    replicas = TeacherConfig(model="m", replicas=3).replicas
    assert (replicas.min, replicas.max) == (3, 3)


def test_the_default_engine_is_transformers():
    assert TeacherConfig(model="m").engine == TransformersEngineConfig()
    assert TeacherConfig(model="m", engine={"dtype": "bfloat16"}).engine == TransformersEngineConfig(dtype="bfloat16")
    given = {"kind": "vllm", "tensor_parallel_size": 2, "arguments": {"enforce_eager": True}}
    config = TeacherConfig(model="m", engine=given)
    assert config.engine == VLLMEngineConfig(tensor_parallel_size=2, arguments={"enforce_eager": True})
    assert TeacherConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ({"arguments": {"pipeline_parallel_size": 2}}, "not counted in the GPUs of a replica; set 'pipeline_parallel"),
        ({"arguments": {"enable_expert_parallel": True}}, "set 'expert_parallel' instead"),
        ({"arguments": {"worker_extension_cls": "a.B"}}, "'worker_extension_cls' in 'arguments' is set by rayk"),
        ({"expert_parallel": True}, "'expert_parallel' spreads the experts over"),
        ({"data_parallel_size": 2, "across_nodes": True}, "leave 'across_nodes' out"),
        ({"quantization": "FP 8"}, "quantization"),
        ({"hidden": True}, "hidden"),
    ],
)
def test_unusable_settings_of_vllm_are_rejected(engine, sentence):
    with pytest.raises(ValueError, match=sentence):
        TeacherConfig(model="m", engine={"kind": "vllm"} | engine)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"engine": {"device_map": "auto"}}, "over resources.num_gpus GPUs; set resources.num_gpus"),
        ({"engine": {"device_map": "auto", "device": "cpu"}, "resources": {"num_gpus": 2}}, "leave 'device' out"),
        ({"engine": {"device_map": "cuda"}, "resources": {"num_gpus": 2}}, "device_map"),
    ],
)
def test_unusable_device_maps_are_rejected(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TeacherConfig(model="m", **settings)


def test_a_policy_may_run_on_vllm():
    method = {"kind": "on_policy", "form": "policy"}
    settings = parse_config(changed(method=method, rollouts=on_vllm(tensor_parallel_size=2)))
    assert settings.rollouts.engine == VLLMPolicyEngineConfig(tensor_parallel_size=2)
    assert parse_config(yaml.safe_load(settings.to_yaml())) == settings
    assert parse_config(changed(method=method, rollouts={"kind": "served"})).rollouts.engine == PolicyEngineConfig()


def test_a_config_has_these_sections():
    sections = [
        "name", "output", "seed", "teachers", "ensemble", "route", "student", "data", "synthesis", "rounds", "method",
        "rollouts", "training", "evaluation", "cache", "tracking",
    ]  # fmt: skip
    assert list(RunConfig.model_fields) == sections


@pytest.mark.parametrize("old", ["TransformersEngine", "VLLMEngine"])
def test_the_old_names_of_engine_settings_work_with_a_warning(old):
    with pytest.warns(DeprecationWarning, match=rf"rayk\.{old} is now rayk\.{old}Config"):
        assert getattr(rayk, old) is getattr(rayk.config, f"{old}Config")


@pytest.mark.parametrize(
    ("engine", "method", "sentence"),
    [
        ({"kind": "simulated"}, {"support": {"kind": "hidden"}}, "the simulated engine has no support 'hidden'"),
    ],
)
def test_a_support_that_the_engine_lacks_is_rejected(engine, method, sentence):
    values = {
        "teachers": [{"model": "m", "engine": engine}], "student": {"model": "m"}, "data": {"train": {"path": "p"}},
        "method": {"kind": "logit_kd"} | method,
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        parse_config(values)
    assert sentence in str(caught.value)
    parse_config(values | {"teachers": [{"model": "m"}]})
