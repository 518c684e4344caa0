"""The weight of a token in a mean loss, which several methods share."""

from rayk.config.sections import MethodSettings, Normalization, Run


class TokenLossConfig(MethodSettings):
    """Base of methods with a loss at each counted token."""

    normalize: Normalization = "tokens"
    """The mean that the loss is. `tokens`: over all counted tokens of the step. `sequences`: over its sequences of the
    means over their tokens (as in GKD's paper), so that a short answer has the weight of a long one. `teachers`: over
    the teachers that `route` chose in the step of the means over their tokens, so that a teacher of few or short rows
    has the weight of the others. The training metrics are the same mean."""

    @property
    def normalization(self) -> Normalization:
        return self.normalize

    def check(self, run: Run) -> None:
        super().check(run)
        if self.normalize == "teachers" and not (run.route and self.queries_teacher):
            lacks = "this run has no 'route'" if self.queries_teacher else f"method '{self.kind}' queries no teacher"
            raise ValueError(
                f"method.normalize 'teachers' is the mean over the teachers of 'route', but {lacks}; choose 'tokens' "
                "or 'sequences', or set 'route'"
            )
