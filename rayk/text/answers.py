"""Finding the answer in what a model wrote, and comparing it with the truth (Fine-tune-CoT, arXiv 2212.10071, whose
evaluator's rules these are, but for the faults ALGORITHMS §10 and §25.13 list).

Where a delimiter such as `-->` or "the answer is" stands in the text, the first candidate after its first occurrence is
the answer; where it is missing, the last candidate is.
"""

import re
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal

# With or without the comma: a parser that insists on it finds nothing in texts that were made without (§25.13).
DELIMITER = re.compile(r"-->|(?:therefore,?\s+)?\bthe\s+(?:final\s+)?answer\s+is\b:?", re.IGNORECASE)

TOLERANCE = Decimal("1e-6")

# A sign counts where it is no operator ("5-3" holds 5 and 3); commas only where they part thousands ("1, 2" is two).
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])(?P<sign>[-+−]))?[$€£¥]?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
)
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_MONTH_NAMES = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_MONTHS = [name[:3] for name in _MONTH_NAMES]
_MONTH = "|".join(["Sept", *(f"{name[:3]}(?:{name[3:]})?" for name in _MONTH_NAMES)])
_DATE = re.compile(
    r"(?P<iso>\b\d{4}-\d{1,2}-\d{1,2}\b)|(?P<numbers>\b\d{1,2}/\d{1,2}/\d{4}\b)"
    rf"|(?P<month_first>\b(?:{_MONTH})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b)"
    rf"|(?P<day_first>\b\d{{1,2}}(?:st|nd|rd|th)?\s+(?:{_MONTH})\.?,?\s+\d{{4}}\b)",
    re.IGNORECASE,
)


def find_last_match(text: str, pattern: str | None) -> str | None:
    """What the one group of `pattern` finds last in `text`, white space folded; None where it finds nothing. Without a
    pattern the whole text."""
    if pattern is not None:
        found = re.findall(pattern, text)
        if not found:
            return None
        text = found[-1]
    return " ".join(text.split())


def find_answer(text: str, kind: str, *, choices: str = "ABCDE", continues: bool = False) -> str | None:
    """The answer of type `kind` ('number', 'choice', 'yes_no', 'date', 'free') in `text`, in one form of writing.

    Args:
        choices: the letters of type 'choice'.
        continues: the text was written after a delimiter, so that its first candidate is the answer.

    Returns:
        A plain decimal ('-1250.5'), a letter, 'yes' or 'no', a date as '2021-05-23', or text; None where there is none.
    """
    delimiter = DELIMITER.search(text)
    after = text[delimiter.end() :] if delimiter else text
    candidates = list(_free(after) if kind == "free" else _FINDERS[kind](after, choices))
    if not candidates:
        return None
    return candidates[0] if delimiter or continues else candidates[-1]


def answers_match(one: str, other: str, kind: str) -> bool:
    """Whether two answers, as `find_answer` gives them, are the same: numbers to 1e-6, text whatever its case."""
    if kind == "number":
        return abs(Decimal(one) - Decimal(other)) <= TOLERANCE
    return one.casefold() == other.casefold()


def _numbers(text: str, _: str) -> Iterator[str]:
    for found in _NUMBER.finditer(text):
        value = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
        number = f"{-value if found['sign'] in ('-', '−') else value:f}"
        yield (number.rstrip("0").rstrip(".") if "." in number else number) or "0"


def _letters(text: str, choices: str) -> Iterator[str]:
    """Letters in brackets and such as stand alone; "A" before a small letter is the article."""
    others = choices.replace("A", "") or "-"
    pattern = rf"\(([{choices}{choices.lower()}])\)|(?<![\w'’])(A(?!['’]|\s+[a-z])|[{others}](?!['’]))(?!\w)"
    for bracketed, alone in re.findall(pattern, text):
        if (letter := (bracketed or alone).upper()) in choices:
            yield letter


def _yes_or_no(text: str, _: str) -> Iterator[str]:
    yield from (found.lower() for found in _YES_NO.findall(text))


def _dates(text: str, _: str) -> Iterator[str]:
    for found in _DATE.finditer(text):
        day = _date_of(str(found.lastgroup), found.group())
        if day is not None:
            yield day.isoformat()


def _date_of(form: str, text: str) -> date | None:
    """None for one that no calendar has."""
    try:
        if form == "iso":
            return date(*map(int, text.split("-")))
        if form == "numbers":
            month, day, year = map(int, text.split("/"))
            return date(year, *((month, day) if month <= 12 else (day, month)))
        words = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|[.,]", "", text).split()
        name, number = words[:2] if form == "month_first" else (words[1], words[0])
        month = _MONTHS.index(name[:3].capitalize()) + 1
        return date(int(words[2]), month, int(number))
    except ValueError:
        return None


def _free(text: str) -> Iterator[str]:
    """The first line that says something, without the full stop and quotation marks around it."""
    for line in text.splitlines():
        stripped = " ".join(line.split()).strip(" .\"'“”’`*:")
        if stripped:
            yield stripped
            return


_FINDERS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "number": _numbers,
    "choice": _letters,
    "yes_no": _yes_or_no,
    "date": _dates,
}
