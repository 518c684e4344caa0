"""An engine with the tiny teacher, and the same model in plain transformers."""

import pytest
from transformers import AutoModelForCausalLM

from rayk.engines.transformers import TransformersEngine


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.fixture(scope="module")
def reference(tiny_teacher):
    """The same model in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
