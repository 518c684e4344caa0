"""Split text in any script into words: one tokenization for ROUGE-L, n-grams, shingles and lengths.

ASCII text is split into rouge-score's tokens (sequences of a-z and 0-9 in lower case, without stemming), so that
decisions equal those of rouge-score. That library drops all other characters, and so whole languages such as Chinese.
Here a word is a sequence of Unicode letters, digits and marks (in NFKC, so that full-width forms and decomposed accents
make no difference). In scripts without spaces between words, each character with its marks is a word, as usual in
sacreBLEU's `zh` and in ROUGE for Chinese; this needs no dictionary.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import regex

UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{New_Tai_Lue}"
    r"\p{Tai_Le}\p{Javanese}\p{Balinese}"
)
"""Scripts without spaces between words, as a character class of `regex`."""
_ASCII_WORD = re.compile("[a-z0-9]+")
_WORD = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{N}}]&&[{UNSPACED}]][\p{{M}}]*|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+|\p{{M}}+"
)


def normalize(text: str) -> str:
    """Return `text` in NFKC and lower case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


def words(text: str) -> list[str]:
    """Return the words of `text` (characters, for scripts without spaces) in order, without punctuation and symbols."""
    text = normalize(text)
    return _ASCII_WORD.findall(text) if text.isascii() else _WORD.findall(text)


def ngrams(items: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Return every sequence of `n` consecutive items, in order; none if there are fewer items."""
    return zip(*(items[start:] for start in range(n)), strict=False)


def whole_characters(text: str) -> str:
    """Replace each half of a surrogate pair, which JSON can contain but UTF-8 cannot, by a question mark."""
    return text.encode("utf-8", "replace").decode()
