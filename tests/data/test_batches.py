import datetime
import inspect
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayk.config import DataConfig, DataSource
from rayk.data.batches import BatchSampler, collate, get_pad_id, make_batches, micro_batches
from rayk.errors import InputError
from rayk.signals.sequence import TokenSequence
from tests.tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer


def sequence(ids, counted):
    return TokenSequence(np.array(ids, dtype=np.int32), np.array(counted, dtype=bool))


ROWS = [
    sequence([5, 6, 7, 1], [0, 0, 1, 1]),
    sequence([8, 1], [0, 1]),
    sequence([9, 1, 1, 10, 11, 1], [0, 1, 0, 0, 1, 1]),
]


def test_batch_is_padded_by_length_even_if_pad_is_eos():
    batch = collate(ROWS, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 1, 1], [8, 1, 1, 1, 1, 1], [9, 1, 1, 10, 11, 1]]
    assert batch.attention_mask.sum(1).tolist() == [4, 2, 6]
    assert batch.counted_mask.sum(1).tolist() == [2, 1, 3]
    assert batch.targets.tolist() == [7, 1, 1, 1, 11, 1]
    assert batch.offsets.tolist() == [0, 2, 3, 6]
    assert (batch.rows, batch.counted_tokens) == (3, 6)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.offsets.dtype == torch.int64
    assert batch.counted_mask.dtype == torch.bool


def test_counted_selects_the_position_before_each_counted_token():
    batch = collate(ROWS, pad_id=0)
    row, position = torch.meshgrid(torch.arange(3), torch.arange(6), indexing="ij")
    marker = torch.stack([row, position], -1)
    taken = batch.counted(marker)
    assert taken.tolist() == [[0, 1], [0, 2], [1, 0], [2, 0], [2, 3], [2, 4]]
    # one on from where they are predicted, the counted tokens stand themselves
    assert batch.input_ids[taken[:, 0], taken[:, 1] + 1].tolist() == batch.targets.tolist()
    assert batch.counted(marker[..., 0]).shape == (6,)
    with pytest.raises(ValueError, match=r"must begin with \[3, 6\]"):
        batch.counted(marker[:, :-1])


def test_model_that_fits_the_rows_has_zero_loss_on_their_batch():
    """Closed check of the shift: logits that name the next token give targets, shifted logits do not."""
    batch = collate([ROWS[0], sequence([3, 4, 5, 6, 7], [0, 1, 1, 1, 1])], pad_id=0)
    following = torch.nn.functional.one_hot(batch.input_ids.roll(-1, 1), 16).float()
    assert batch.counted(following).argmax(-1).equal(batch.targets)
    assert not batch.counted(following.roll(1, 1)).argmax(-1).equal(batch.targets)


def test_gradients_pass_through_counted():
    batch = collate(ROWS, pad_id=0)
    x = torch.zeros(3, 6, 2, requires_grad=True)
    batch.counted(x).sum().backward()
    assert x.grad[..., 0].long().tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]


def test_select_pads_to_the_longest_selected_row():
    batch = collate(ROWS, pad_id=0).select([1, 0])
    assert batch.input_ids.tolist() == [[8, 1, 0, 0], [5, 6, 7, 1]]
    assert batch.targets.tolist() == [1, 7, 1] and batch.sequences == [ROWS[1], ROWS[0]]


def test_position_zero_cannot_be_counted():
    with pytest.raises(ValueError, match="position 0"):
        sequence([1, 2], [1, 1])
    with pytest.raises(ValueError, match="one length"):
        sequence([1, 2], [0])


lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(lengths=lengths_lists, batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_epoch_has_every_row_once(lengths, batch_size, seed):
    total = len(lengths)
    steps = -(-3 * total // batch_size)
    sampler = BatchSampler(lengths, batch_size, seed, steps)
    batches = list(sampler)
    assert len(sampler) == steps and all(len(rows) == batch_size for rows in batches)
    stream = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == list(range(total))


@given(lengths=lengths_lists, prompts=st.integers(1, 9), samples=st.integers(1, 4))
def test_each_row_of_a_step_occurs_as_often_as_there_are_samples(lengths, prompts, samples):
    one = BatchSampler(lengths, prompts, 3, 20)
    several = BatchSampler(lengths, prompts * samples, 3, 20, samples=samples)
    for step in (0, 7, 19):
        assert several.rows(step).tolist() == np.repeat(one.rows(step), samples).tolist()
    assert several.epochs(4) == one.epochs(4) == 4 * prompts / len(lengths)


@given(lengths=lengths_lists, seed=st.integers(0, 9), step=st.integers(0, 1000))
def test_step_depends_on_seed_and_step_only(lengths, seed, step):
    warmed = BatchSampler(lengths, 8, seed, 1)
    for other in (step + 3, 0, step // 2):
        warmed.rows(other)
    warmed = pickle.loads(pickle.dumps(warmed))
    assert warmed.rows(step).tolist() == BatchSampler(lengths, 8, seed, 99).rows(step).tolist()


def test_order_differs_between_epochs_and_seeds_and_is_fixed():
    first, second = (BatchSampler([1] * 12, 12, 7, 2).rows(step).tolist() for step in (0, 1))
    assert first != second != BatchSampler([1] * 12, 12, 8, 2).rows(1).tolist()
    assert first == [8, 4, 3, 6, 2, 1, 0, 5, 11, 9, 10, 7], "another order would break resumed runs"


@given(lengths=lengths_lists, world=st.integers(1, 9), extra=st.integers(0, 20), step=st.integers(0, 20))
def test_shares_of_any_number_of_ranks_add_up_to_the_batch(lengths, world, extra, step):
    sampler = BatchSampler(lengths, world + extra, 0, 1)
    shares = [sampler.share(step, rank, world) for rank in range(world)]
    assert all(len(share) for share in shares)
    assert sorted(np.concatenate(shares)) == sorted(sampler.rows(step))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_shares_have_nearly_equal_numbers_of_tokens():
    lengths = np.random.default_rng(0).lognormal(5, 1, 1000).astype(int) + 1
    sampler = BatchSampler(lengths, 64, 0, 10)
    for step in range(10):
        loads = [lengths[sampler.share(step, rank, 4)].sum() for rank in range(4)]
        in_order = lengths[sampler.rows(step)].reshape(4, 16).sum(1)
        assert max(loads) - min(loads) <= lengths[sampler.rows(step)].max()
        assert max(loads) <= max(in_order)


def test_more_workers_than_rows_are_refused():
    with pytest.raises(InputError, match="training.batch_size is 2, but there are 3 workers"):
        BatchSampler([1, 2, 3], 2, 0, 1).share(0, 0, 3)


@given(lengths=st.lists(st.integers(1, 300), max_size=40), max_tokens=st.integers(1, 1000))
def test_micro_batches_have_each_row_once_within_the_budget(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= max_tokens
    assert groups == micro_batches(np.array(lengths, dtype=int), max_tokens)


def test_micro_batches_are_filled():
    assert micro_batches([3, 1, 1, 3, 1, 9], 6) == [[5], [0, 3], [1, 2, 4]]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_make_batches_gives_the_same_for_dicts_files_and_sources(tmp_path, pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    rows = [{"question": f"the cat {i}", "answer": "24 " * (i + 1)} for i in range(5)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(str(row).replace("'", '"') for row in rows))
    fields = {"prompt_field": "question", "completion_field": "answer"}
    for given_rows, extra in (
        (rows, fields),
        (str(path), fields),
        (DataSource(path=str(path), **fields), {}),
    ):
        batches = make_batches(given_rows, tokenizer, 2, **extra)
        assert [batch.rows for batch in batches] == [2, 2, 1]
        for row, each in zip(rows, [one for batch in batches for one in batch.sequences], strict=True):
            assert tokenizer.decode(each.targets) == row["answer"] + EOS
        for batch in batches:
            texts = [tokenizer.decode(part) for part in batch.targets.tensor_split(batch.offsets[1:-1])]
            assert all(text.count(EOS) == 1 and text.endswith(EOS) for text in texts)
    shuffled = make_batches(rows, tokenizer, 5, shuffle_seed=1, **fields)[0]
    assert sorted(len(each) for each in shuffled.sequences) == sorted(len(e) for b in batches for e in b.sequences)


def test_make_batches_takes_all_settings_of_data_and_pins_dates():
    names = set(inspect.signature(make_batches).parameters)
    assert set(DataConfig.model_fields) - {"train", "evaluation"} <= names
    tokenizer = tiny_tokenizer(chat_template="{{ strftime_now('%Y-%m-%d') }}\n" + CHAT_TEMPLATE)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (pinned,) = make_batches(rows, tokenizer, 1, chat_template_date=datetime.date(2025, 3, 9))
    assert tokenizer.decode(pinned.input_ids[0]).startswith("2025-03-09\n<|user|>")


def test_make_batches_refuses_wrong_arguments(tokenizer):
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(InputError, match="'promt_field'; did you mean 'prompt_field'"):
        make_batches(rows, tokenizer, 1, promt_field="x")
    with pytest.raises(InputError, match="row 1 has no field 'x' .*; set prompt_field"):
        make_batches(rows, tokenizer, 1, format="prompt_completion", prompt_field="x")
    with pytest.raises(InputError, match="row 1 has 3 tokens, more than max_tokens .1."):
        make_batches(rows, tokenizer, 1, max_tokens=1)
    with pytest.raises(InputError, match="max_tokens: "):
        make_batches(rows, tokenizer, 1, max_tokens=0)
    with pytest.raises(InputError, match="Row 1 is a str"):
        make_batches(["text"], tokenizer, 1)
    with pytest.raises(InputError, match="batch_size is 0"):
        make_batches(rows, tokenizer, 0)
    with pytest.raises(InputError, match="together with a DataSource"):
        make_batches(DataSource(path="x"), tokenizer, 1, prompt_field="y")


def test_pad_id_falls_back_to_eos(tokenizer):
    assert get_pad_id(tokenizer) == tokenizer.pad_token_id
    without = tiny_tokenizer()
    without.pad_token = None
    assert get_pad_id(without) == without.eos_token_id
