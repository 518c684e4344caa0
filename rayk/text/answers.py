"""Find the answer in a completion and compare it with the right answer.

If the text contains a delimiter such as `-->` or "the answer is", the answer is the first candidate after its first
occurrence, else the last candidate. Candidates are found as in Fine-tune-CoT's evaluator (arXiv 2212.10071), except
where that would misread a text: "5-3" contains 5 and 3, not −3, and a letter within a word is no choice.
"""

import re
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal

# The comma is optional, because some training texts lack it.
DELIMITER = re.compile(r"-->|(?:therefore,?\s+)?\bthe\s+(?:final\s+)?answer\s+is\b:?", re.IGNORECASE)

TOLERANCE = Decimal("1e-6")

# A sign counts unless it is an operator ("5-3" contains 5 and 3), a comma between thousands ("1, 2": two numbers).
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
    """Return the last match of the one group of `pattern`, with white space collapsed; None if there is no match.

    Without a pattern the whole text is returned.
    """
    if pattern is not None:
        found = re.findall(pattern, text)
        if not found:
            return None
        text = found[-1]
    return " ".join(text.split())


def find_answer(text: str, kind: str, *, choices: str = "ABCDE", continues: bool = False) -> str | None:
    """Return the answer of type `kind` ('number', 'choice', 'yes_no', 'date', 'free') in `text`, normalized.

    Args:
        choices: letters of type 'choice'.
        continues: the text follows a delimiter, so that its first candidate is the answer.

    Returns:
        A plain decimal ('-1250.5'), a letter, 'yes' or 'no', a date as '2021-05-23', or text; None if there is none.
    """
    delimiter = DELIMITER.search(text)
    after = text[delimiter.end() :] if delimiter else text
    candidates = list(_free(after) if kind == "free" else _FINDERS[kind](after, choices))
    if not candidates:
        return None
    return candidates[0] if delimiter or continues else candidates[-1]


def answers_match(one: str, other: str, kind: str) -> bool:
    """Return whether two answers of `find_answer` are equal: numbers to 1e-6, texts ignoring case."""
    if kind == "number":
        return abs(Decimal(one) - Decimal(other)) <= TOLERANCE
    return one.casefold() == other.casefold()


def _numbers(text: str, _: str) -> Iterator[str]:
    for found in _NUMBER.finditer(text):
        value = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
        number = f"{-value if found['sign'] in ('-', '−') else value:f}"
        yield (number.rstrip("0").rstrip(".") if "." in number else number) or "0"


def _letters(text: str, choices: str) -> Iterator[str]:
    """Yield letters in brackets and single letters, except an "A" before a lower-case word, which is the article."""
    others = choices.replace("A", "") or "-"
    pattern = rf"\(([{choices}{choices.lower()}])\)|(?<![\w'’])(A(?!['’]|\s+[a-z])|[{others}](?!['’]))(?!\w)"
    for bracketed, alone in re.findall(pattern, text):
        if (letter := (bracketed or alone).upper()) in choices:
            yield letter


def _yes_or_no(text: str, _: str) -> Iterator[str]:
    yield from (found.lower() for found in _YES_NO.findall(text))


def _dates(text: str, _: str) -> Iterator[str]:
    for found in _DATE.finditer(text):
        day = _parse_date(str(found.lastgroup), found.group())
        if day is not None:
            yield day.isoformat()


def _parse_date(form: str, text: str) -> date | None:
    """Return the date in `text`; None if there is no such day."""
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
    """Yield the first line with content, without full stop and quotation marks around it."""
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
