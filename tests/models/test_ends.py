import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rayk.config import DataConfig, DataSource, parse_config
from rayk.data.tokenizing import tokenize
from rayk.engines.base import SamplingParameters
from rayk.engines.generation import generate
from rayk.errors import InputError
from rayk.models.ends import end_token_ids, repair_generation_config
from rayk.run import distill
from rayk.run.inputs import read_inputs
from rayk.training.student import save_model
from tests.runs import settings
from tests.tiny import END, EOS, tiny_model, tiny_tokenizer

TOKENIZER = SimpleNamespace(eos_token_id=2)


@pytest.mark.parametrize(
    ("own", "trained", "ends"),
    [(1, (), (1,)), ([1, 3], (3, 5), (1, 3, 5)), (None, (), (2,)), (None, (7,), (2, 7)), (0, (0,), (0,))],
)
def test_ends_are_the_models_own_and_the_trained_ones(own, trained, ends):
    assert end_token_ids(GenerationConfig(eos_token_id=own), TOKENIZER, trained) == ends


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
PAIR = {"prompt": "2 + 2?", "completion": " 4"}


@pytest.mark.parametrize("prompts_only", [False, True])
@pytest.mark.parametrize(("row", "chat_template", "end"), [(CHAT, False, END), (PAIR, True, END), (PAIR, False, EOS)])
def test_rows_teach_the_end_of_their_completions(tmp_path, row, chat_template, end, prompts_only):
    tokenizer = tiny_tokenizer()
    source = write(tmp_path / "rows.jsonl", row)
    table = tokenize(source, DataConfig(chat_template=chat_template), tokenizer, prompts_only=prompts_only)
    assert table.ends == (tokenizer.convert_tokens_to_ids(end),)


def test_truncated_rows_teach_no_end(tmp_path):
    tokenizer = tiny_tokenizer()
    source = write(tmp_path / "rows.jsonl", PAIR | {"completion": f"a{END}b c d"})
    [row] = tokenize(source, DataConfig(), tokenizer)
    cut = row.input_ids.tolist().index(tokenizer.convert_tokens_to_ids(END)) + 1
    assert tokenize(source, DataConfig(max_tokens=cut, too_long="truncate"), tokenizer).ends == ()


def writer_of(token, tokenizer):
    """Return a model that writes `token` after anything."""
    model = tiny_model(hidden=16, layers=1, tokenizer=tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[token] = 0
        for parameter in model.model.norm.parameters():
            parameter.zero_()
    bias = torch.full((384,), -9.0)
    bias[token] = 9.0
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    return model


def test_generation_stops_at_the_given_ends():
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    model = writer_of(end, tokenizer)

    def write(*ends):
        parameters = SamplingParameters(5, 0.0, end_token_ids=ends)
        [completion] = generate(model, 384, tokenizer, [np.array([7, 8])], parameters, [0])
        return completion.finish_reason, completion.token_ids.tolist()

    assert write() == ("length", [end] * 5)
    assert write(1, end) == ("stop", [end])


def chat_config(tmp_path, method, tokenizer):
    """Return a run on chat rows whose student's own end is EOS, while rows end with the template's end of turn."""
    folder = tmp_path / "student"
    tiny_model(folder, hidden=32, layers=1, tokenizer=tokenizer)
    source = write(tmp_path / "rows.jsonl", *[CHAT] * 8)
    values = settings(tmp_path, str(folder), method, steps=40, learning_rate=2e-2)
    values["data"] = {"train": {"path": source.path}, "evaluation": {"path": source.path, "rows": 1}}
    values["evaluation"] = {"generation": {"max_new_tokens": 8}}
    return values


def test_a_student_stops_where_its_training_ended(tmp_path):
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    values = chat_config(tmp_path, "supervised", tokenizer)
    result = distill(parse_config(values))
    assert result.summary["student"]["stopped"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.generation_config.eos_token_id == [1, end]
    prompt = tokenizer.apply_chat_template(CHAT["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, -1] == end


def test_generation_settings_that_transformers_refuses_to_save_lose_no_student(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=1)
    with pytest.raises(ValueError, match="do_sample"):
        model.save_pretrained(tmp_path / "refused")
    save_model(model, tokenizer, tmp_path / "model")
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.eos_token_id) == (True, 0.6, 0.9, 1)


def test_generation_settings_that_will_be_repaired_are_noted_before_training(tmp_path):
    values = settings(tmp_path, str(tmp_path / "student"))
    tiny_model(tmp_path / "student", hidden=16, layers=1, tokenizer=tiny_tokenizer())
    assert read_inputs(parse_config(values), {}).notes == ()
    file = tmp_path / "student" / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}))
    (note,) = read_inputs(parse_config(values), {}).notes
    assert note.startswith("generation_config.json of student.model") and "do_sample" in note
    assert "\n" not in note


def test_generation_settings_that_cannot_be_repaired_are_reduced_to_the_special_tokens():
    broken = GenerationConfig(eos_token_id=[1, 3])
    broken.max_new_tokens = -5
    assert "max_new_tokens" in str(repair_generation_config(broken))
    assert broken.eos_token_id == [1, 3] and broken.max_new_tokens is None
    assert repair_generation_config(broken) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"eos_token_id": 1', "is not JSON"),
        ('{"num_return_sequences": 4, "do_sample": false}', "is not valid; .*num_return_sequences"),
        ("[1, 3]", "is not valid; "),
    ],
)
@pytest.mark.parametrize("reader", ["student", "teacher"])
def test_generation_settings_that_cannot_be_loaded_are_refused_before_training(tmp_path, reader, text, problem):
    for name in ("student", "teacher"):
        tiny_model(tmp_path / name, hidden=16, layers=1, tokenizer=tiny_tokenizer())
    (tmp_path / reader / "generation_config.json").write_text(text)
    values = settings(tmp_path, str(tmp_path / "student"))
    values["teachers"] = [{"model": str(tmp_path / "teacher")}]
    values["method"] = {"kind": "logit_kd"}
    with pytest.raises(InputError, match=rf"generation_config.json of '.*{reader}' {problem}"):
        read_inputs(parse_config(values), {})
