"""Every support of the transformers engine, compared with the model's own dense logits."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from rayk import losses
from rayk.config.support import Hidden, Layers, Requested, Sampled, TopK
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.models import pack_head, unpack_head
from rayk.signals.sequence import TokenSequence
from tests.engines.reference import VOCAB, dense, sequence, with_requested_ids
from tests.tiny import tiny_model, tiny_tokenizer


def score(engine, sequences, support):
    signals = asyncio.run(engine.score(sequences, support))
    return replace(signals, head=engine.head()) if isinstance(support, Hidden) else signals


SEQUENCES = [sequence(length, seed) for seed, length in enumerate((9, 40, 3, 17))]


@pytest.mark.parametrize("k", [0, 5, VOCAB])
def test_requested_ids_are_combined_with_the_likeliest(engine, reference, k):
    sequences = with_requested_ids(SEQUENCES, 6)
    signals = score(engine, sequences, Requested(k, (1.0, 2.0)))
    exact = dense(reference, sequences)
    width = min(k + 6, VOCAB)
    assert signals.ids.shape == (len(exact), width)
    asked = np.concatenate([one.requested for one in sequences])
    for ids, named, likeliest in zip(signals.ids, asked, exact[:, :VOCAB].topk(k).indices, strict=True):
        assert len(set(ids.tolist())) == width
        assert set(named[named >= 0]) | set(likeliest.tolist()) <= set(ids.tolist())
    torch.testing.assert_close(signals.logprobs, exact.gather(1, signals.ids), atol=1e-4, rtol=0)
    assert bool((signals.logprobs.diff(dim=1) <= 0).all())
    for temperature in (1.0, 2.0):
        ours = losses.reverse_kl(exact, signals, temperature=temperature)
        assert ours.abs().max() < 1e-4
    torch.testing.assert_close(signals.offsets.diff(), torch.tensor([one.counted_tokens for one in sequences]))


def test_missing_unequal_or_invalid_requested_ids_are_refused(engine):
    for sequences, said in [
        (SEQUENCES, "needs the ids"),
        (
            [with_requested_ids(SEQUENCES, 3)[0], with_requested_ids(SEQUENCES, 4)[1]],
            "3 and 4 requested ids per position",
        ),
        (
            [TokenSequence(np.array([5, 6], np.int32), np.array([False, True]), np.array([[VOCAB]], np.int32))],
            "outside",
        ),
    ]:
        with pytest.raises(InputError, match=said):
            score(engine, sequences, Requested(4))
    with pytest.raises(ValueError, match="requested ids of shape"):
        TokenSequence(np.array([5, 6], np.int32), np.array([False, True]), np.zeros((2, 3), np.int32))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("tie", [False, True])
def test_hidden_states_and_the_head_reproduce_the_dense_logits(tmp_path, architecture, tie):
    """Tied heads, heads with a scale (granite, cohere) and with a soft-cap (gemma2)."""
    model = tiny_model(tmp_path, architecture=architecture, tie=tie, peaked=4.0, tokenizer=tiny_tokenizer())
    engine = TransformersEngine(str(tmp_path))
    exact = dense(model, SEQUENCES)
    signals = score(engine, SEQUENCES, Hidden("float32"))
    torch.testing.assert_close(signals.logits().log_softmax(1), exact, atol=1e-4, rtol=0)
    packed = replace(signals, head=unpack_head(pack_head(engine.head())))
    assert torch.equal(packed.logits(), signals.logits())
    for dtype, bound in (("float16", 0.004), ("bfloat16", 0.03)):
        rounded = score(engine, SEQUENCES, Hidden(dtype))
        assert rounded.hidden.dtype == getattr(torch, dtype)
        assert losses.forward_kl(exact, rounded).mean() < bound
        assert losses.reverse_kl(exact, rounded).mean() < bound


def test_coarser_signals_give_smaller_divergences(engine, tiny_student):
    student = dense(AutoModelForCausalLM.from_pretrained(tiny_student).eval(), SEQUENCES)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"):
        exact = losses.divergence(name, student, score(engine, SEQUENCES, Hidden("float32")))
        values = [
            losses.divergence(name, student, score(engine, SEQUENCES, support)) for support in (TopK(4), TopK(64))
        ]
        ids = student[:, :VOCAB].topk(8).indices.numpy().astype(np.int32)
        starts = np.cumsum([0, *(one.counted_tokens for one in SEQUENCES)])
        asked = [
            TokenSequence(one.input_ids, one.counted, ids[start:end])
            for one, start, end in zip(SEQUENCES, starts, starts[1:], strict=False)
        ]
        united = losses.divergence(name, student, score(engine, asked, Requested(4)))
        assert bool((values[0] <= values[1] + 1e-5).all())
        assert bool((values[1] <= exact + 1e-4).all())
        assert bool((values[0] <= united + 1e-5).all())
        assert bool((united <= exact + 1e-4).all())


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.0, 0.8, 1.2])
def test_sampled_weights_are_unbiased(engine, reference, tau):
    one = [sequence(6)]
    exact = dense(reference, one).double()[:, :VOCAB].log_softmax(1).exp()
    rounds, total, counts = 400, torch.zeros_like(exact), torch.zeros_like(exact)
    for seed in range(rounds):
        signals = score(engine, one, Sampled(50, tau, seed))
        drawn = torch.zeros_like(exact).scatter(1, signals.ids, signals.weights.double())
        assert bool((drawn > 0).sum(1).le(50).all())
        total += drawn
        if tau == 1.0:
            torch.testing.assert_close(drawn.sum(1), torch.ones(len(exact)).double())
            counts += drawn * 50
    proposal = (tau * exact.log()).softmax(1)
    # Standard error of the mean of `rounds * 50` samples of the weight p / proposal.
    error = ((exact**2 / proposal - exact**2).clamp(min=1e-12) / (rounds * 50)).sqrt()
    often = proposal * rounds * 50 >= 20  # else the mean is not approximately normal
    assert bool(((total / rounds - exact).abs() < 5 * error)[often].all())
    rare = (total / rounds * ~often).sum(1), (exact * ~often).sum(1)
    torch.testing.assert_close(*rare, atol=5 * float((error**2 * ~often).sum(1).max().sqrt()), rtol=0)
    if tau == 1.0:
        for found, p in zip(counts, exact, strict=True):
            expected = p.numpy() * rounds * 50
            often = expected >= 5
            observed = [*found.numpy()[often], found.numpy()[~often].sum()]
            assert chisquare(observed, [*expected[often], expected[~often].sum()]).pvalue > 1e-4


def test_samples_depend_only_on_the_seed_and_the_sequence(engine):
    support = Sampled(20, seed=3)
    batch, alone = score(engine, SEQUENCES, support), score(engine, SEQUENCES[1:2], support)
    row = batch.select([1])
    # Other rows in a batch change probabilities by rounding, and therefore a sample at a boundary.
    assert (row.ids == alone.ids).float().mean() > 0.98
    others = score(engine, SEQUENCES, Sampled(20, seed=4))
    assert not torch.equal(others.weights, batch.weights)
    assert len({tuple(row.tolist()) for row in batch.ids}) > len(batch.ids) // 2


def test_sampled_signals_contain_the_teachers_entropy(engine, reference):
    exact = dense(reference, SEQUENCES)[:, :VOCAB].log_softmax(1)  # padding is never drawn
    signals = score(engine, SEQUENCES, Sampled(10))
    torch.testing.assert_close(signals.entropies, -(exact.exp() * exact).sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_states_of_layers_are_the_models_own(engine, reference, dtype):
    signals = score(engine, SEQUENCES, Layers((0, 1), dtype, "float32"))
    exact = []
    for one in SEQUENCES:
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        found = reference(input_ids=ids, output_hidden_states=True)
        before = torch.from_numpy(np.flatnonzero(one.counted)) - 1
        exact.append([found.hidden_states[place][0, before] for place in (1, 2)])
    first, last = (torch.cat(states) for states in zip(*exact, strict=True))
    close = (
        {"atol": 1e-4, "rtol": 0}
        if dtype == "float32"
        else {"atol": 0.004 * float(first.detach().abs().max()), "rtol": 0}
    )
    torch.testing.assert_close(signals.layer_states(0), first, **close)
    normed = reference.model.norm(signals.layer_states(1))
    torch.testing.assert_close(normed, last, atol=1e-4 if dtype == "float32" else 0.02, rtol=0)
    whole = replace(signals, head=engine.head()).as_hidden()
    torch.testing.assert_close(whole.logits().log_softmax(1), dense(reference, SEQUENCES), atol=1e-4, rtol=0)
    spread = score(engine, SEQUENCES, Layers(1, dtype))
    assert torch.equal(spread.layers[:, 0], signals.layers[:, 1])
    assert spread.hidden is None
    with pytest.raises(InputError, match="has only layers 0 to 1"):
        score(engine, SEQUENCES, Layers((2,)))
