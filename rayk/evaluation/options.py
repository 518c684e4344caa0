"""Rows whose answer is one of several options: the likeliest is the answer, and the majority of several draws of
demonstrations decides (Multitask-ICT, arXiv 2212.10670)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from rayk.data.demonstrations import DemonstratedRow, DemonstrationPool
from rayk.data.examples import Example
from rayk.data.views import RowViews
from rayk.evaluation.answers import Answer, AnswerScorer

LogProbs = Callable[[list[Example]], list[float]]
"""log P of each row's counted tokens together, nats."""

_ROWS_AT_ONCE = 32


def with_options(examples: Iterable[Example], views: RowViews | None) -> list[Example]:
    """The rows that are answered by one of their options."""
    if views is None or views.demonstrations is None:
        return []
    return [row for row in examples if views.demonstrations.option_ids(row)]


def answer_by_options(
    rows: Iterable[Example], pool: DemonstrationPool, draws: int, scorer: AnswerScorer, log_probs: LogProbs
) -> Iterator[Answer]:
    """The answer to each of `rows`, in order, which must have options."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, _ROWS_AT_ONCE)):
        queries = [pool.demonstrate_draw(row, draw) for row in chunk for draw in range(draws)]
        chosen = likeliest(queries, log_probs, per_token=pool.normalizes_by_length)
        for number in range(len(chunk)):
            of_row = range(number * draws, (number + 1) * draws)
            texts = [scorer.text_of(queries[each].options[chosen[each]]) for each in of_row]
            voted = of_row[scorer.majority(texts)]
            option = queries[voted].options[chosen[voted]]
            yield scorer.score(queries[voted], scorer.text_of(option), "stop", len(option))


def likeliest(queries: Sequence[DemonstratedRow], log_probs: LogProbs, *, per_token: bool) -> list[int]:
    """Which of its options each query is answered; with `per_token` by the mean over the option's tokens."""
    answers = [answer for query in queries for answer in query.alternatives]
    scores = iter(
        score / answer.counted_tokens if per_token else score
        for score, answer in zip(log_probs(answers), answers, strict=True)
    )
    chosen = []
    for query in queries:
        of_query = list(islice(scores, len(query.options)))
        chosen.append(of_query.index(max(of_query)))
    return chosen
