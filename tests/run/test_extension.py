"""A finished run cannot be made longer; the error says how to train further."""

import pytest

from rayk.errors import InputError
from rayk.run import distill
from tests.runs import config


def test_more_steps_are_refused_with_a_way_to_train_further(tmp_path, tiny_student):
    distill(config(tmp_path, tiny_student, steps=2))
    with pytest.raises(InputError, match=r"another 'training\.steps'; .* student\.model '.*/run/model' and ano"):
        distill(config(tmp_path, tiny_student, steps=4), resume=True)
    with pytest.raises(InputError, match="give another --output, or delete the directory"):
        distill(config(tmp_path, tiny_student, steps=2))
