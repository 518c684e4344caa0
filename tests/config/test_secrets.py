"""Secrets in settings are recognized, and masked in what rayk writes and prints."""

import base64

import pytest
import yaml

from rayk.config import RunConfig, check_inputs_exist, load_config, parse_config
from rayk.config.marks import all_places
from rayk.config.secrets import MASK, _has_secret_name, hide, redact, remember_secret, without_masks
from rayk.errors import InputError, SettingsError

MINIMAL = {"student": {"model": "m"}, "data": {"train": {"path": "r.jsonl"}}, "method": {"kind": "supervised"}}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SE%2FCRET@bucket/a", "s3://***@bucket/a"),
        ("s3://KEY:SE/CR+ET@bucket/a", "s3://***@bucket/a"),
        ("at 's3://KEY:pw@b/c?region=x&secret_key=abc' failed", "at 's3://***@b/c?region=x&secret_key=***' failed"),
        ("https://host/x?X-Amz-Signature=1f&max_tokens=3", "https://host/x?X-Amz-Signature=***&max_tokens=3"),
        ("s3://bucket/user@host/a", "s3://bucket/user@host/a"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("s3://bucket/a?endpoint_override=http%3A%2F%2Fh:1&scheme=http",) * 2,
    ],
)  # fmt: skip
def test_credentials_in_uris_are_hidden(text, shown):
    assert hide(text) == shown


def test_secrets_are_recognized_by_name():
    values = {
        "hf_token": "hf_abcdef", "engine": [{"API-Key": "k", "apiKey": "k", "AWS_SECRET_ACCESS_KEY": "k"}],
        "password": 1234567, "headers": {"Authorization": "Bearer abc"}, "credentials": {"user": "u"},
    }  # fmt: skip
    assert redact(values) == {
        "hf_token": MASK, "engine": [dict.fromkeys(values["engine"][0], MASK)], "password": MASK,
        "headers": {"Authorization": MASK}, "credentials": MASK,
    }  # fmt: skip
    others = {
        "max_tokens": 3, "pad_token": "<pad-token>", "token": "yes", "api_key_variable": "OPENAI_API_KEY",
        "key": "abcdefg",
        "tokenizer": "org/name", "secret": None, "keys": ["abcdefgh"], "token_ids": [1, 2],
    }  # fmt: skip
    assert redact(others) == others


def test_no_setting_of_rayk_has_the_name_of_a_secret():
    assert not [place for place in all_places(RunConfig) if _has_secret_name(place.rpartition(".")[2])]


def test_known_secrets_are_found_in_any_text():
    remember_secret("q7Zr-9wL_tok")
    for before in ("", "a", "ab", "user:"):
        text = base64.b64encode(f"{before}q7Zr-9wL_tok and more".encode()).decode()
        assert "q7Zr" not in hide(f"{before}q7Zr-9wL_tok") and text not in hide(text)
    assert hide("nothing to hide") == "nothing to hide"


def test_a_stored_config_has_no_secrets_and_says_what_is_missing(tmp_path):
    engine = {"kind": "vllm", "arguments": {"hf_token": "hf_secret1", "max_num_seqs": 3}}
    values = MINIMAL | {
        "teachers": [{"model": "org/teacher", "engine": engine}],
        "training": {"checkpoints": "s3://KEY:secret2@bucket/a?region=x"}, "data": {"train": {"path": "org/rows"}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(parse_config(values).to_yaml())
    text = (tmp_path / "config.yaml").read_text()
    assert "secret" not in text and "KEY" not in text
    stored = load_config(tmp_path / "config.yaml")
    assert stored.teachers[0].engine.arguments == {"hf_token": MASK, "max_num_seqs": 3}
    assert without_masks(stored.training.checkpoints) == "s3://bucket/a?region=x"
    with pytest.raises(InputError, match=r"^teachers\.0\.engine\.arguments\.hf_token is '\*\*\*', which stands for"):
        check_inputs_exist(stored)


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({"teachers": [{"model": "m", "engine": {"kind": "openai", "base_url": "https://me:Secret99@host/v1"}}]}, []),
        ({"teachers": [{"model": "m", "engine": {"kind": "vllm", "arguments": "hf_token=Secret99",
                                                 "api_key": "Secret99"}}]}, []),
        ({"output": "s3://KEY:Secret99@bucket/run"}, []),
        ({"training": {"steps": {"password": "Secret99"}}}, []),
        ({}, ["teachers.7.engine.arguments.hf_token=Secret99"]),
        ({}, ["training.checkpoints=s3://KEY:Secret99@bucket/[", "nowhere"]),
    ],
)  # fmt: skip
def test_errors_of_settings_do_not_repeat_secrets(tmp_path, changes, overrides):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL | changes))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "run.yaml", overrides)
    assert "Secret99" not in hide(str(caught.value))
    if "hf_token" not in str(changes):
        assert "Secret99" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("engine: {hf_token: Secret99", []),
        ('engine:\n  hf_token: "Secret99', []),
        ("api_key: Secret99: x", []),
        (yaml.safe_dump(MINIMAL), ["training.steps={hf_token: Secret99, x: ["]),
        (yaml.safe_dump(MINIMAL), ['training.0.steps=[{"api_key":"Secret99"}]']),
    ],
)  # fmt: skip
def test_errors_of_broken_yaml_do_not_quote_secrets(tmp_path, text, overrides):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "run.yaml", overrides)
    assert "Secret99" not in str(caught.value)


def test_trust_in_remote_code_has_one_setting():
    with pytest.raises(SettingsError, match="'trust_remote_code' in 'arguments' would overrule"):
        parse_config(
            MINIMAL
            | {"teachers": [{"model": "m", "engine": {"kind": "vllm", "arguments": {"trust_remote_code": True}}}]}
        )
