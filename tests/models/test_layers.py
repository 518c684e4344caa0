"""A student cut from a model equals the model whose layers were removed by hand."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayk.config import StudentConfig, parse_config
from rayk.errors import InputError
from rayk.models.layers import choose_layers
from rayk.models.lora import has_adapter
from rayk.models.student import build_model_config, count_parameters, count_planned_parameters, make_model
from rayk.run.evaluation import measured_student
from rayk.training.student import save_model
from tests.tiny import perturb, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_model(folder, hidden=16, layers=7, tie=True, tokenizer=TOKENIZER)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_layers_are_spread_evenly_with_the_first_and_the_last():
    assert choose_layers(10, 30) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert [choose_layers(count, 4) for count in (1, 2, 3, 4)] == [[0], [0, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert choose_layers([5, 2], 6) == [5, 2]


@pytest.mark.parametrize("layers", [3, [6, 0, 2]], ids=str)
def test_the_cut_student_equals_a_cut_by_hand_bit_for_bit(folder, layers, tmp_path):
    student = make_model(StudentConfig(model=folder, layers=layers), TOKENIZER, seed=0)
    by_hand = AutoModelForCausalLM.from_pretrained(folder)
    chosen = [0, 3, 6] if layers == 3 else layers
    by_hand.model.layers = torch.nn.ModuleList(by_hand.model.layers[i] for i in chosen)
    by_hand.config.num_hidden_layers = 3
    for place, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = place
    expected = by_hand.state_dict()
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
    assert torch.equal(logits(student), logits(by_hand))

    save_model(student, TOKENIZER, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(by_hand))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 3
    measured = measured_student(StudentConfig(model=folder, layers=layers), str(tmp_path / "model"), None)
    assert torch.equal(logits(make_model(measured, TOKENIZER, seed=0)), logits(by_hand))


def test_a_student_with_all_layers_is_the_whole_model(folder):
    whole = make_model(StudentConfig(model=folder), TOKENIZER, seed=0)
    assert torch.equal(logits(make_model(StudentConfig(model=folder, layers=7), TOKENIZER, seed=0)), logits(whole))


def test_a_cut_student_with_an_adapter_is_saved_whole_and_without_a_separate_adapter(folder, tmp_path):
    student = perturb(make_model(StudentConfig(model=folder, layers=2, lora={"r": 2}), TOKENIZER, seed=0)).eval()
    assert has_adapter(student)
    save_model(student, TOKENIZER, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(student), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "adapter").exists()  # no base that it fits is saved


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_size_is_known_without_loading_weights(folder, lora):
    config = StudentConfig(model=folder, layers=3, lora=lora)
    assert count_planned_parameters(config, TOKENIZER) == count_parameters(make_model(config, TOKENIZER, seed=0))
    assert build_model_config(config, TOKENIZER).num_hidden_layers == 3


@pytest.mark.parametrize(
    ("layers", "said"),
    [(8, "student.layers is 8, but student.model has only 7 layers"), ([0, 7], "names layer 7, but .* layers 0 to 6")],
)
def test_layers_that_the_model_lacks_are_refused(folder, layers, said):
    with pytest.raises(InputError, match=said):
        build_model_config(StudentConfig(model=folder, layers=layers), TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "m", "layers": 0}, "student.layers"),
        ({"model": "m", "layers": []}, "student.layers"),
        ({"model": "m", "layers": [-1]}, "student.layers"),
        ({"model": "m", "layers": [0, 2, 0]}, r"'layers' lists a layer twice \(\[0, 2, 0\]\)"),
        ({"config": {"model_type": "llama"}, "layers": 2}, "'layers' cuts a trained model, but 'config' starts from"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        parse_config({"student": settings, "data": {"train": {"path": "rows"}}, "method": {"kind": "supervised"}})
