"""Classes and functions of the user are named by 'module:name'; their options reach them unchanged."""

import pytest
import yaml

from rayk.config import parse_config
from rayk.config.support import Hidden, TopK
from rayk.errors import InputError

BASE = {
    "teachers": [{"model": "m"}], "student": {"model": "s"}, "data": {"train": {"path": "p"}},
    "method": {"kind": "logit_kd"},
}  # fmt: skip


def test_a_custom_method_declares_what_a_run_must_know():
    method = {"kind": "custom", "path": "my_pkg.my_file:MyMethod", "options": {"a": [1, {"b": None}]}}
    config = parse_config(BASE | {"method": method})
    assert config.method.options == {"a": [1, {"b": None}]}
    assert (config.signal_support, config.method.reads_completions, config.rollouts) == (TopK(), True, None)
    config = parse_config(BASE | {"method": method | {"rollouts": True, "support": {"kind": "hidden"}}})
    assert (config.signal_support, config.rollouts.kind, config.method.reads_completions) == (Hidden(), "worker", False)
    alone = parse_config(BASE | {"teachers": [], "method": method | {"support": None, "pairs": True}})
    assert (alone.signal_support, alone.method.reads_pairs) == (None, True)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    with pytest.raises(InputError, match="method.kind 'custom' needs a teacher"):
        parse_config(BASE | {"teachers": [], "method": method})


def test_an_entry_point_is_a_path_too():
    assert parse_config(BASE | {"method": {"kind": "custom", "path": "my-method"}}).method.path == "my-method"


@pytest.mark.parametrize("path", ["a b", "a:b:c", "", "a:", ":b", "a/b.py:c"])
def test_a_path_that_is_neither_is_rejected(path):
    with pytest.raises(InputError, match="method.path is .*; write it as 'module:name'"):
        parse_config(BASE | {"method": {"kind": "custom", "path": path}})


def test_a_custom_divergence_takes_any_option():
    name = "my_pkg.file:divergence"
    for given, options in ((name, {}), ({"name": name, "scale": 2, "parts": [1]}, {"scale": 2, "parts": [1]})):
        config = parse_config(BASE | {"method": {"kind": "logit_kd", "divergence": given}})
        assert (config.method.divergence.is_custom, config.method.divergence.options) == (True, options)
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
    with pytest.raises(InputError, match="method.divergence: unknown key 'scale'; Allowed: name, beta"):
        parse_config(BASE | {"method": {"kind": "logit_kd", "divergence": {"name": "forward_kl", "scale": 2}}})


def test_a_custom_synthesis_says_whether_it_has_prompts_and_pairs():
    custom = {"kind": "custom", "path": "mine:Recipe", "options": {"n": 3}}
    config = parse_config(BASE | {"synthesis": custom})
    assert (config.synthesis.options, config.synthesis_teacher) == ({"n": 3}, "teacher")
    own = {"data": {}, "synthesis": custom | {"own_prompts": True, "pairs": True}, "method": {"kind": "preference"}}
    assert parse_config(BASE | own).synthesis.writes_pairs
    with pytest.raises(InputError, match="synthesis 'custom' completes the prompts of data.train"):
        parse_config(BASE | {"data": {}, "synthesis": custom})


def test_a_custom_engine_says_whether_it_returns_signals():
    engine = {"kind": "custom", "path": "mine:Engine", "options": {"speed": 1}}
    config = parse_config(BASE | {"teachers": [{"model": "m", "engine": engine}]})
    assert (config.teachers[0].gives_signals, config.teachers[0].engine.options) == (True, {"speed": 1})
    with pytest.raises(InputError, match="engine kind 'custom' generates text and gives no signals"):
        parse_config(BASE | {"teachers": [{"model": "m", "engine": engine | {"signals": False}}]})


def test_custom_metrics_are_functions():
    evaluation = {"generation": {}, "metrics": ["mine:score"]}
    data = {"train": {"path": "p"}, "evaluation": {"path": "p"}}
    assert parse_config(BASE | {"data": data, "evaluation": evaluation}).evaluation.metrics == ["mine:score"]
    with pytest.raises(InputError, match=r"evaluation.metrics.0 is 'score'; write it as 'module:name'"):
        parse_config(BASE | {"data": data, "evaluation": evaluation | {"metrics": ["score"]}})
