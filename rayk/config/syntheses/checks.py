"""Checks that several syntheses share."""

import string

from pydantic import AfterValidator

from rayk.config.sections import SynthesisSettings


def template_with(*needed: str):
    def check(template: str) -> str:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(f"is not a template: {error}; write {{{{ and }}}} for literal braces") from error
        if names != set(needed):
            raise ValueError(f"needs the names {', '.join(f'{{{name}}}' for name in needed)} and no others")
        return template

    return AfterValidator(check)


def refuse_thoughts(settings: SynthesisSettings) -> None:
    if settings.thoughts == "keep":
        raise ValueError(
            f"thoughts: synthesis '{settings.kind}' composes its rows from parts of several replies, so they cannot "
            "keep the replies' thoughts; leave it out"
        )
