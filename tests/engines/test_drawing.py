"""Draws from categorical distributions: as plain inversion, also across blocks, and never of weight 0."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rayk.engines.drawing import draw_ids

LARGEST = 1 - 2**-53


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_ids_are_those_of_plain_inversion(vocab):
    random = np.random.default_rng(vocab)
    weights = torch.from_numpy(random.random((3, vocab)))
    numbers = torch.from_numpy(random.random((3, 50)))
    cumulative = weights.cumsum(1)
    expected = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    assert draw_ids(weights, numbers).tolist() == expected.tolist()


@pytest.mark.parametrize("possible", [[0], [255], [256], [999], [3, 256, 300, 998]])
def test_ids_of_weight_zero_are_never_drawn(possible):
    weights = torch.zeros(1, 1000)
    weights[0, possible] = torch.rand(len(possible), generator=torch.Generator().manual_seed(0)) * 1e-30
    numbers = torch.linspace(0, LARGEST, 2001, dtype=torch.float64)
    assert set(draw_ids(weights, numbers[None]).unique().tolist()) == set(possible)


def test_no_rounding_leads_past_the_last_possible_id():
    """The sums of a block, in two orders, differ in their last bits."""
    weights = torch.zeros(2000, 1000, dtype=torch.float64)
    weights[:, :200] = torch.from_numpy(np.random.default_rng(0).random((2000, 200)))
    assert (draw_ids(weights, torch.full((2000, 1), LARGEST, dtype=torch.float64)) == 199).all()


def test_ids_follow_the_weights():
    weights = torch.rand(1, 700, generator=torch.Generator().manual_seed(0))
    numbers = torch.from_numpy(np.random.default_rng(0).random((1, 70_000)))
    counts = np.bincount(draw_ids(weights, numbers)[0].numpy(), minlength=700)
    expected = weights[0].double() / weights.double().sum() * 70_000
    often = expected.numpy() >= 5
    observed = [*counts[often], counts[~often].sum()]
    assert chisquare(observed, [*expected[often], expected[~often].sum()]).pvalue > 1e-4
