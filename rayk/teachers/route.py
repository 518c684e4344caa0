"""Choose a teacher for each row: `Route`, with the interface of a single teacher. All teachers are queried at the same
time."""

from collections.abc import Mapping, Sequence

from rayk.config import RouteConfig, RunConfig
from rayk.config.support import Support, TopK
from rayk.engines.batching import gather
from rayk.errors import InputError, UnusableSignal
from rayk.signals.batch import SignalBatch, concatenate
from rayk.signals.sequence import TokenSequence
from rayk.teachers.client import HasSequences, Scorer, Teacher, sequences_of
from rayk.teachers.ensemble import Ensemble, check_members


class Route:
    """Scores each row with one of several teachers, chosen by a field of the row."""

    def __init__(self, settings: RouteConfig, teachers: Mapping[str, Scorer]):
        self.settings = settings
        self.teachers = teachers

    @property
    def vocab_size(self) -> int:
        return next(iter(self.teachers.values())).vocab_size

    def split(self, rows: Sequence[TokenSequence]) -> dict[str, list[int]]:
        """Return the indices of each teacher's rows by its name.

        Raises:
            InputError: a row has no teacher.
        """
        indices: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            indices.setdefault(choose_teacher_name(row, self.settings), []).append(index)
        return indices

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """Like `Teacher.ascore`; the signals are in the order of the rows.

        An ensemble among the teachers returns more ids than were requested. They are reduced to `support.k`, so that
        the signals of a row do not depend on the rows beside it.
        """
        sequences, support = sequences_of(batch), support or TopK()
        indices = self.split(sequences)
        parts = await gather(self._score(name, sequences, rows, support) for name, rows in indices.items())
        if isinstance(support, TopK):
            parts = [signals.keep_likeliest(support.k) for signals in parts]
        place = {row: i for i, row in enumerate(row for rows in indices.values() for row in rows)}
        return concatenate(parts).select([place[row] for row in range(len(sequences))])

    async def _score(
        self, name: str, sequences: Sequence[TokenSequence], rows: list[int], support: Support
    ) -> SignalBatch:
        try:
            return await self.teachers[name].ascore([sequences[row] for row in rows], support)
        except UnusableSignal as error:
            raise UnusableSignal(str(error), [rows[place] for place in error.rows]) from error


def build_scorer(config: RunConfig, teachers: Mapping[str, Teacher]) -> Scorer | None:
    """Return the route, the ensemble or the single teacher that gives the run's signals; None without a teacher.

    Raises:
        InputError: a member of the ensemble does not support the ensemble's requests.
    """
    known: dict[str, Scorer] = dict(teachers)
    if config.ensemble is not None:
        names = config.ensemble.teachers or list(teachers)
        if isinstance(config.signal_support, TopK):
            check_members([teachers[name] for name in names])
        weights = [config.ensemble.weights.get(name, 1.0) for name in names]
        known["ensemble"] = Ensemble([known[name] for name in names], weights, config.ensemble.combine)
    if config.route is not None:
        return Route(config.route, known)
    return known.get("ensemble") or known.get(config.evaluation_teacher)


def choose_teacher_name(row: TokenSequence, route: RouteConfig) -> str:
    """Return the name of the teacher that a route selects for a row by one of its fields (`rayk.data.Example.fields`).

    Raises:
        InputError: the row lacks the field, or `route.teachers` does not contain its value, and there is no default.
    """
    value = getattr(row, "fields", {}).get(route.field)
    name = route.default if value is None else route.teachers.get(str(value), route.default)
    if name is not None:
        return name
    where = getattr(row, "where", "") or "A row"
    if value is None:
        raise InputError(
            f"{where} has no value in the field '{route.field}', by which route.field chooses its teacher; correct "
            "route.field or the row, or set route.default."
        )
    raise InputError(
        f"{where} has '{value}' in its field '{route.field}', which chooses no teacher; add the value to "
        "route.teachers, or set route.default."
    )


def split_by_teacher(scorer: Scorer, rows: Sequence[TokenSequence]) -> list[tuple[Teacher, list[int]]]:
    """Return each teacher with the indices of its rows: those that a route chooses, or a single one with all rows."""
    if not isinstance(scorer, Route):
        assert isinstance(scorer, Teacher)
        return [(scorer, list(range(len(rows))))]
    found = []
    for name, indices in scorer.split(rows).items():
        teacher = scorer.teachers[name]
        assert isinstance(teacher, Teacher)  # an ensemble generates nothing, and the settings do not allow it here
        found.append((teacher, indices))
    return found
