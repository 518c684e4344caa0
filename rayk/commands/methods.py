"""`rayk methods`: list the methods, what each needs from a teacher, and its paper."""

import textwrap

from rayk.methods import METHODS

_WIDTH = 100


def describe_methods() -> str:
    """Return a paragraph per `method.kind`, at most 100 columns wide."""
    indent = max(map(len, METHODS)) + 2
    paragraphs = []
    for kind, method in METHODS.items():
        lines = [method.summary, f"needs: {method.needs}", f"paper: {method.paper}"]
        wrapped = [part for line in lines for part in textwrap.wrap(line, _WIDTH - indent, subsequent_indent="  ")]
        names = [kind] + [""] * (len(wrapped) - 1)
        paragraphs.append("\n".join(f"{name:{indent}}{line}" for name, line in zip(names, wrapped, strict=True)))
    return "\n\n".join(paragraphs)
