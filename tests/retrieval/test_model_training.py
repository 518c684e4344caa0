"""The retriever's models are trained on the right candidates, learn from them, and repeat exactly."""

import numpy as np
import pytest
import torch

from rayk.config import RetrieverConfig
from rayk.data.nearest import Embedder, EncoderSettings
from rayk.errors import RunFailed
from rayk.retrieval.model_training import (
    ComputeSettings,
    RetrieverTexts,
    RewardModel,
    ScoredCandidates,
    compute_rewards,
    fit_encoder,
    fit_reward_model,
)
from rayk.retrieval.teacher_scores import REFUSED
from tests.tiny import tiny_encoder

WORDS = ["cat", "dog", "mat", "log", "sat", "clips"]
COMPUTE = ComputeSettings(seed=0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture
def settings(encoder):
    """make(**changes): a retriever's settings, small."""

    def make(**changes):
        common = {"steps": 80, "warmup_steps": 5, "batch_size": 8, "learning_rate": 3e-3}
        given = {
            "encoder": encoder, "reward_model": {"model": encoder, "negatives": 3, **common}, "positives": 1,
            "worst": 4, "passages": 3, "temperature": 0.1, **common,
        }  # fmt: skip
        return RetrieverConfig.model_validate(given | changes)

    return make


def task():
    """Six queries with one word each; the good one of six passages has the next word, which only the scores show."""
    count = len(WORDS)
    rows, none = np.arange(count), np.full(count, -1)
    texts = RetrieverTexts(
        [f"the {word}" for word in WORDS], [f"\n{word}" for word in WORDS],
        [f"on the {word}\nyes" for word in WORDS], rows, rows + count, none, none,
    )  # fmt: skip
    scored = [
        ScoredCandidates(query, rows, np.where(rows == (query + 1) % count, 0.0, -6.0).astype(np.float32))
        for query in range(count)
    ]
    return texts, scored


def test_best_and_worst_candidates_do_not_overlap():
    scored = ScoredCandidates(0, np.arange(7), np.array([-3, -1, -2, -9, -1.5, REFUSED, -4], np.float32))
    best, worst = scored.split_best_and_worst(positives=3, worst=2)
    assert best.tolist() == [1, 4, 2] and worst.tolist() == [3, 5]
    best, worst = scored.split_best_and_worst(positives=3, worst=16)
    assert best.tolist() == [1, 4, 2] and worst.tolist() == [0, 6, 3, 5]


@pytest.mark.parametrize("scores", [[-1, -2], [-1, REFUSED, -2], [REFUSED] * 5], ids=["few", "two", "none"])
def test_query_with_too_few_useful_candidates_is_skipped(scores):
    scored = ScoredCandidates(0, np.arange(len(scores)), np.array(scores, np.float32))
    best, worst = scored.split_best_and_worst(positives=2 if len(scores) == 2 else 3, worst=16)
    assert len(best) == len(worst) == 0


def test_encoder_learns_the_scores_and_loads_with_its_settings(settings, tmp_path):
    texts, scored = task()
    calls = []
    fit_encoder(settings(), texts, scored, tmp_path / "fit", COMPUTE, lambda *given: calls.append(given))
    assert [done for done, _, _ in calls] == list(range(1, 81))
    embedder = Embedder(str(tmp_path / "fit"))
    assert embedder.settings == EncoderSettings(max_tokens=256, prompt="", outputs=True)
    similar = np.stack(list(embedder.scores(texts.passages, texts.queries)))
    assert similar.argmax(1).tolist() == [1, 2, 3, 4, 5, 0]
    before = np.stack(list(Embedder(settings().encoder).scores(texts.passages, texts.queries)))
    assert before.argmax(1).tolist() != [1, 2, 3, 4, 5, 0]


@pytest.mark.slow
def test_reward_model_learns_the_scores_and_returns_rewards_in_order(settings, tmp_path):
    texts, scored = task()
    favorite = np.where(np.arange(len(WORDS)) == 2, 0.0, -6.0).astype(np.float32)
    scored = [ScoredCandidates(each.query, np.roll(each.candidates, each.query), np.roll(favorite, each.query))
              for each in scored]  # fmt: skip
    own = settings().reward_model
    loss = fit_reward_model(settings(), texts, scored, tmp_path / "reward", COMPUTE)
    assert loss < 0.3 < np.log(own.negatives + 1)
    rewards = compute_rewards(own, texts, scored, tmp_path / "reward", COMPUTE)
    assert [int(each.candidates[given.argmax()]) for each, given in zip(scored, rewards, strict=True)] == [2] * 6
    model = RewardModel(str(tmp_path / "reward"), own)
    with torch.inference_mode():
        alone = [float(model.scores(texts, [(each.query, each.candidates[4])])) for each in scored]
    assert alone == pytest.approx([float(each[4]) for each in rewards], abs=1e-4)


def test_training_repeats_and_leaves_the_global_random_state(settings, tmp_path):
    texts, scored = task()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses = [fit_encoder(settings(steps=6), texts, scored, tmp_path / name, COMPUTE) for name in "ab"]
    assert losses[0] == losses[1]
    assert torch.equal(torch.rand(3), expected)
    other = fit_encoder(settings(steps=6), texts, scored, tmp_path / "c", ComputeSettings(seed=1))
    assert other != losses[0]


def test_candidates_with_the_querys_label_are_not_negatives(settings, tmp_path):
    texts, scored = task()
    labels = np.zeros(len(WORDS), np.int64)
    same = RetrieverTexts(**{**vars(texts), "query_labels": labels, "passage_labels": labels})
    with pytest.raises(RunFailed, match="No training row has candidates both good and bad"):
        fit_encoder(settings(), same, scored, tmp_path / "fit", COMPUTE)


def test_loss_that_is_not_finite_stops_training(settings, tmp_path):
    texts, scored = task()
    with pytest.raises(RunFailed, match="lower method.demonstrations.retriever's learning_rate"):
        fit_encoder(settings(learning_rate=1e30), texts, scored, tmp_path / "fit", COMPUTE)
