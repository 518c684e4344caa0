"""The scorer with the parts of prompts that vLLM's model runners pass to it, without an engine.

`test_vllm.py` runs it in the V1 runner, which computes on a CPU. The V2 runner requires a GPU; here its own
`PromptLogprobsWorker` is called as the runner calls it.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rayk.config.support import Hidden, Requested, Sampled, TopK
from rayk.engines.packed_columns import unpack_columns
from rayk.engines.reduce import reduce_logits, stack_position_inputs
from rayk.engines.vllm_scorer import PromptPart, Scorer, attach_scorer
from rayk.engines.vllm_task import ScoringTask
from tests.engines.reference import VOCAB, sequence, with_requested_ids

pytest.importorskip("vllm")
pytestmark = pytest.mark.cluster  # imports vLLM

WIDTH = 16
SUPPORTS = [TopK(5, (1.0, 2.0)), Requested(3), Sampled(10), Hidden("float32")]


class Model(nn.Module):
    """A head with the interface of vLLM's models."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lm_head = nn.Linear(WIDTH, VOCAB + 8)

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)


@pytest.fixture(scope="module")
def model():
    return Model()


def tasks(support):
    sequences = with_requested_ids([sequence(length, length) for length in (30, 5, 17)], 4)
    arguments = {
        str(i): ScoringTask.from_sequence(one, support, VOCAB).to_arguments() for i, one in enumerate(sequences)
    }
    states = [torch.randn(len(one), WIDTH, generator=torch.Generator().manual_seed(len(one))) for one in sequences]
    return sequences, states, arguments


@torch.no_grad()
def expected(model, sequences, states, support):
    """Return each sequence's columns, computed at once."""
    rows = [
        state[torch.from_numpy(np.flatnonzero(one.counted) - 1)] for one, state in zip(sequences, states, strict=True)
    ]
    found = []
    for one, row in zip(sequences, rows, strict=True):
        inputs = stack_position_inputs([one], support)
        columns = reduce_logits(
            model.compute_logits(row), torch.from_numpy(one.targets.astype(np.int64)), support, VOCAB, inputs
        )
        found.append(columns | {"hidden": row} if isinstance(support, Hidden) else columns)
    return found


def assert_signals(packed, columns, support):
    found = unpack_columns(packed, support, VOCAB, 4 if isinstance(support, Requested) else 0, WIDTH)
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        torch.testing.assert_close(found[name].float(), column.float(), atol=1e-4, rtol=2.0**-11)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_prompts_read_in_parts_have_the_signals_of_whole_prompts(model, support):
    sequences, states, arguments = tasks(support)
    scorer = Scorer(model)
    assert all(scorer.add(name, task) for name, task in arguments.items())
    assert not scorer.add("generates", None)
    # Two steps: the first prompt in two parts, in another order than the rows of other requests.
    step = torch.cat([torch.zeros(3, WIDTH), states[0][:11], states[1]])
    signals = scorer.score_step(
        step,
        [
            PromptPart("generates", 0, 3, 0, True), PromptPart("0", 0, 11, 3, False), PromptPart("1", 0, 5, 14, True),
        ],
    )  # fmt: skip
    assert signals.keys() == {"1"}
    step = torch.cat([states[2], states[0][11:]])
    signals |= scorer.score_step(step, [PromptPart("0", 11, 30, 17, True), PromptPart("2", 0, 17, 0, True)])
    for name, columns in enumerate(expected(model, sequences, states, support)):
        assert_signals(signals[str(name)], columns, support)


def test_a_preempted_prompt_starts_again_and_cached_states_leave_rows_out(model):
    sequences, states, arguments = tasks(TopK(5))
    scorer = Scorer(model)
    scorer.add("0", arguments["0"])
    scorer.score_step(states[0][:20], [PromptPart("0", 0, 20, 0, False)])
    signals = scorer.score_step(states[0], [PromptPart("0", 0, 30, 0, True)])
    assert_signals(signals["0"], expected(model, sequences, states, TopK(5))[0], TopK(5))
    scorer.add("0", arguments["0"])
    signals = scorer.score_step(states[0][20:], [PromptPart("0", 20, 30, 0, True)])
    assert len(signals["0"]) < sequences[0].counted_tokens
    scorer.add("1", arguments["1"])
    scorer.remove("1")
    assert scorer.score_step(states[1], [PromptPart("1", 0, 5, 0, True)]) == {}


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_the_v2_runners_worker_returns_the_signals(model, support):
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    worker = PromptLogprobsWorker(8, torch.device("cpu"))
    attach_scorer(SimpleNamespace(prompt_logprobs_worker=worker, get_model=lambda: model))
    sequences, states, arguments = tasks(support)
    places = {"0": 5, "1": 2, "2": 7}  # rows of the runner's own tables
    for name, place in places.items():
        worker.add_request(name, place, SamplingParams(max_tokens=1, extra_args=arguments[name]))
    worker.add_request("3", 0, SamplingParams(max_tokens=4))
    lengths = np.zeros(8, np.int32)
    lengths[[*places.values(), 0]] = [*map(len, sequences), 6]

    def step(names, starts, counts, prefill=None):
        """Compute as `GPUModelRunner.sample_tokens` does; `names` in the order of the batch."""
        rows = [
            states[int(name)][start : start + count] if name != "3" else torch.zeros(count, WIDTH)
            for name, start, count in zip(names, starts, counts, strict=True)
        ]
        index = np.asarray([places.get(name, 0) for name in names])
        batch = SimpleNamespace(
            req_ids=names, idx_mapping_np=index, num_computed_prefill_tokens_np=np.asarray(starts),
            num_scheduled_tokens=np.asarray(counts), query_start_loc_np=np.cumsum([0, *counts]),
            prefill_len_np=lengths[index] if prefill is None else np.asarray(prefill),
        )  # fmt: skip
        return worker.compute_prompt_token_id_logprobs(model.compute_logits, torch.cat(rows), batch, lengths)

    signals = step(["3", "0", "1"], [0, 0, 0], [6, 12, 5])
    assert signals.keys() == {"1"}
    signals |= step(["2", "0", "3"], [0, 12, 6], [17, 18, 1])
    assert signals.keys() == {"0", "1", "2"}
    for name, columns in enumerate(expected(model, sequences, states, support)):
        assert_signals(signals[str(name)], columns, support)
    worker.add_request("0", 5, SamplingParams(max_tokens=1, extra_args=arguments["0"]))
    assert step(["0"], [0], [30], prefill=[31]) == {}  # it was preempted after its signal had been returned
    worker.remove_request("0")


def test_another_model_runner_is_named():
    with pytest.raises(RuntimeError, match="another model runner than rayk knows .*install vLLM 0.32 or 0.33"):
        attach_scorer(SimpleNamespace(get_model=Model))
