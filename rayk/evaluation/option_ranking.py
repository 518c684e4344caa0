"""Answer rows that have a list of possible answers by the likeliest option. With several draws of demonstrations the
answer is the majority over the draws (Multitask-ICT, arXiv 2212.10670)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from rayk.data.demonstrations import DemonstratedRow, DemonstrationPool
from rayk.data.examples import Example
from rayk.data.views import RowViews
from rayk.evaluation.answer_scoring import Answer, AnswerScorer

LogProbs = Callable[[list[Example]], list[float]]
"""Returns the sum of the log-probs of each row's counted tokens, nats."""

_CHUNK_ROWS = 32


def select_option_rows(examples: Iterable[Example], views: RowViews | None) -> list[Example]:
    """Return the rows that are answered by one of their options."""
    if views is None or views.demonstrations is None:
        return []
    return [row for row in examples if views.demonstrations.option_ids(row)]


def answer_with_options(
    rows: Iterable[Example], pool: DemonstrationPool, draws: int, scorer: AnswerScorer, log_probs: LogProbs
) -> Iterator[Answer]:
    """Yield the answer to each of `rows`, in order. Every row must have options."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK_ROWS)):
        queries = [pool.add_evaluation_demonstrations(row, draw) for row in chunk for draw in range(draws)]
        chosen = choose_options(queries, log_probs, per_token=pool.normalizes_by_length)
        for number in range(len(chunk)):
            votes = range(number * draws, (number + 1) * draws)
            texts = [scorer.decode(queries[vote].options[chosen[vote]]) for vote in votes]
            winner = votes[scorer.majority_index(texts)]
            option = queries[winner].options[chosen[winner]]
            yield scorer.score(queries[winner], scorer.decode(option), "stop", len(option))


def choose_options(queries: Sequence[DemonstratedRow], log_probs: LogProbs, *, per_token: bool) -> list[int]:
    """Return the index of each query's likeliest option.

    Args:
        per_token: compare the mean log-prob of an option's tokens instead of the sum.
    """
    answers = [answer for query in queries for answer in query.alternatives]
    scores = iter(
        score / answer.counted_tokens if per_token else score
        for score, answer in zip(log_probs(answers), answers, strict=True)
    )
    chosen = []
    for query in queries:
        option_scores = list(islice(scores, len(query.options)))
        chosen.append(option_scores.index(max(option_scores)))
    return chosen
