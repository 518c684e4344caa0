import pytest
import torch

from rayk.models import final_hidden
from rayk.models.kv_cache import CachedBatch, KeyValues, can_continue
from tests.tiny import tiny_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma2", "granite", "cohere"]


def rows_of(*lengths):
    random = torch.Generator().manual_seed(0)
    return [torch.randint(4, 300, (length,), generator=random) for length in lengths]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def alone(model, row):
    return final_hidden(model, row[None], torch.ones_like(row)[None])[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_continuing_from_the_cache_equals_computing_from_the_start(architecture):
    """Caches and continuations of different lengths (one cache empty); then token by token, after a truncation."""
    model = tiny_model(architecture=architecture)
    if architecture == "gemma2":
        model.config.sliding_window = 8
        assert "sliding_attention" in model.config.layer_types
        model = type(model)(model.config).eval()  # the attention layers have read the window
    assert can_continue(model)
    rows = rows_of(30, 25, 13, 40)
    first = CachedBatch(model, [KeyValues()] * 4)
    counts = torch.tensor([10, 25, 3, 20])
    hidden = first.forward(padded([row[:n] for row, n in zip(rows, counts, strict=True)]), counts)
    for row, n, states in zip(rows, counts.tolist(), hidden, strict=True):
        torch.testing.assert_close(states[:n], alone(model, row[:n]), atol=1e-5, rtol=1e-5)

    pasts = [past.truncate(n) for past, n in zip(first.key_values(), (10, 4, 3, 20), strict=True)]
    pasts[2] = KeyValues()
    assert [len(past) for past in pasts] == [10, 4, 0, 20]
    rest = [row[len(past) :] for row, past in zip(rows, pasts, strict=True)]
    hidden = CachedBatch(model, pasts).forward(padded(rest), torch.tensor([len(each) for each in rest]))
    for row, past, states in zip(rows, pasts, hidden, strict=True):
        torch.testing.assert_close(states[: len(row) - len(past)], alone(model, row)[len(past) :], atol=1e-5, rtol=1e-5)

    stepping = CachedBatch(model, [past.clone() for past in pasts], room=5)  # exceeded twice
    for step in range(12):
        new = torch.stack([each[step] for each in rest])[:, None]
        states = stepping.forward(new)
        for row, past, state in zip(rows, pasts, states, strict=True):
            torch.testing.assert_close(state[0], alone(model, row)[len(past) + step], atol=1e-5, rtol=1e-5)
    assert [len(past) for past in stepping.key_values()] == [22, 16, 12, 32]
    last = CachedBatch(model, stepping.key_values()).forward(torch.stack([each[12] for each in rest])[:, None])
    for row, past, state in zip(rows, pasts, last, strict=True):
        torch.testing.assert_close(state[0], alone(model, row)[len(past) + 12], atol=1e-5, rtol=1e-5)


def test_models_with_a_recurrent_state_cannot_continue():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    assert not can_continue(MambaForCausalLM(config))


def test_clones_share_no_memory():
    model = tiny_model()
    batch = CachedBatch(model, [KeyValues()] * 2)
    with torch.no_grad():
        batch.forward(padded(rows_of(30, 30)))
    part = batch.key_values()[0].truncate(10)
    own = part.clone()
    assert part.nbytes == own.nbytes
    assert part.layers[0][0].untyped_storage().nbytes() > own.layers[0][0].untyped_storage().nbytes()
