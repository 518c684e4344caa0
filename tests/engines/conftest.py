"""One engine of the tiny teacher, and the model itself to hold it against."""

import pytest
from transformers import AutoModelForCausalLM

from rayk.engines.transformers import TransformersEngine


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.fixture(scope="module")
def reference(tiny_teacher):
    """The same model by itself."""
    return AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
