"""The reference of settings has a sentence for every key, and its page is current."""

from pathlib import Path

import pytest

import rayk.config
from rayk.commands.settings import format_settings, settings_markdown
from rayk.config.marks import all_places
from rayk.config.reference import find_sections
from rayk.errors import InputError


def test_every_setting_has_a_description():
    missing = [
        f"{section.title}: {setting.key}"
        for section in find_sections()
        for setting in section.settings
        if not setting.description.endswith((".", ")"))
    ]
    assert not missing


def test_the_reference_lists_every_key():
    listed = {
        f"{section.place}.{setting.key}".lstrip(".") for section in find_sections() for setting in section.settings
    }
    repeated = {section.place: section.same_as for section in find_sections() if section.same_as is not None}
    for place in all_places(rayk.config.RunConfig):
        parent, _, key = place.rpartition(".")
        same = next((f"{new}{parent[len(old) :]}" for old, new in repeated.items() if parent.startswith(old)), parent)
        assert place in listed or f"{same}.{key}" in listed, place


def test_the_page_is_current():
    page = Path(rayk.config.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert page == settings_markdown() + "\n", "run: rayk settings --markdown > rayk/config/README.md"


@pytest.mark.parametrize(
    ("section", "texts"),
    [
        (None, ["seed: integer ≥ 0, default 0", "student: section, required", "rayk settings SECTION"]),
        ("training", ["learning_rate: number > 0 or null, default null", "Peak learning rate", "training.resources"]),
        ("method", ["method (kind: logit_kd)", "method (kind: custom)", "method.support (kind: hidden)"]),
        ("method.on_policy", ["student_fraction: number ≥ 0, ≤ 1, default 1.0"]),
        ("data.evaluation", ["prompt_field: text, default prompt"]),
        ("teachers.engine.vllm", ["tensor_parallel_size: integer ≥ 1, default 1"]),
    ],
)
def test_a_section_is_printed_with_types_defaults_and_descriptions(section, texts):
    printed = format_settings(section, width=90)
    for text in texts:
        assert text in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_an_unknown_section_gets_the_closest_one():
    with pytest.raises(InputError, match="no section 'trainig'; did you mean 'training'?"):
        format_settings("trainig")
