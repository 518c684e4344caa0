import pytest

from rayk.training.student import Student
from tests.methods.small_batch import small_batch
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def batch():
    return small_batch()


@pytest.fixture(scope="module")
def student():
    return Student(tiny_model(seed=3, tie=False))
