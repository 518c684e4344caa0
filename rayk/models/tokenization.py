"""In what two tokenizers with the same token ids treat text differently: merges, normalizers, marks at the ends.

Such a teacher reads token sequences that its own tokenizer would not produce, and its distributions are worse for it.
"""

from typing import Any

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading space, two  spaces, trailing space ",
    "tabs\tand\n\nnew lines\r\n    indented",
    "1234567890 3.14159 1,000,000 2^10 007",
    "def f(x):\n    return {'key': [x ** 2 for x in range(10)]}  # comment",
    "Größe, naïve façade, Ελληνικά, Привет, مرحبا, नमस्ते",
    "你好，世界。こんにちは 안녕하세요",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 cafe\u0301 ﬁ ① Ａ",
    "https://example.org/a_b?c=d&e=f#g <b>html</b> \\frac{1}{2}",
)
"""Texts on which tokenizers are compared."""


def tokenization_differences(student: Any, teacher: Any) -> list[str]:
    """Return clauses on how the teacher's tokenizer treats text differently from the student's; empty if it does not.

    The tokenizers must give tokens the same ids.
    """
    differences = []
    for probe in PROBES:
        own, other = (tokenizer(probe, add_special_tokens=False).input_ids for tokenizer in (student, teacher))
        if list(own) != list(other):
            differences.append(
                f"it splits {probe!r} into {len(other)} tokens ({_first_difference(teacher, other, own)}) and the "
                f"student's into {len(own)} ({_first_difference(student, own, other)})"
            )
            break
    for place, name in ((0, "before"), (1, "after")):
        own_marks, other_marks = (_marks(tokenizer)[place] for tokenizer in (student, teacher))
        if own_marks != other_marks:
            differences.append(
                f"it adds {_names(teacher, other_marks)} {name} a text and the student's {_names(student, own_marks)}"
            )
    if student.eos_token_id != teacher.eos_token_id:
        ends = (_names(one, [] if one.eos_token_id is None else [one.eos_token_id]) for one in (teacher, student))
        differences.append("its end of a text is {} and the student's {}".format(*ends))
    return differences


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text."""
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    marked = list(tokenizer("a").input_ids)
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[:start], marked[start + len(plain) :]
    return marked, []


def _first_difference(tokenizer: Any, ids: list[int], others: list[int]) -> str:
    place = next((i for i, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), len(others))
    return ", ".join(repr(tokenizer.decode([number])) for number in ids[place : place + 3]) or "ends earlier"


def _names(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(str(name) for name in tokenizer.convert_ids_to_tokens(ids)) or "nothing"
