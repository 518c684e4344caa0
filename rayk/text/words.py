"""What a word is, in any script: the one tokenisation that ROUGE-L, n-grams, shingles and lengths share.

ASCII text has rouge-score's own tokens, runs of a-z and 0-9 in lower case without a stemmer, so that what is decided
about it is what rouge-score decides. That library drops every other character, which leaves nothing of Chinese. Here
all letters, digits and marks of Unicode count (in NFKC, so that full-width forms and decomposed accents are no
difference): a run of them is a word, and in scripts that put no spaces between words every character is, with the marks
that belong to it. One character a word is what sacreBLEU's `zh` and ROUGE for Chinese usually take; it needs no
dictionary and is the same everywhere.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import regex

UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{New_Tai_Lue}"
    r"\p{Tai_Le}\p{Javanese}\p{Balinese}"
)
"""Scripts that put no spaces between words, as a character class of `regex`."""
_ASCII_WORD = re.compile("[a-z0-9]+")
_WORD = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{N}}]&&[{UNSPACED}]][\p{{M}}]*|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+|\p{{M}}+"
)


def normalize(text: str) -> str:
    """`text` in NFKC and lower case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


def words(text: str) -> list[str]:
    """The words of `text`, in order; of scripts without spaces, its characters. Punctuation and symbols are none."""
    text = normalize(text)
    return _ASCII_WORD.findall(text) if text.isascii() else _WORD.findall(text)


def ngrams(items: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of `n` items, in order; none where there are fewer."""
    return zip(*(items[start:] for start in range(n)), strict=False)


def whole_characters(text: str) -> str:
    """With a question mark for each half of a surrogate pair, which JSON may hold and nothing else can keep."""
    return text.encode("utf-8", "replace").decode()
