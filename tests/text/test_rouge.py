import random
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from rayk.errors import InputError
from rayk.text import RougeIndex, rouge_l, words


class OurWords(Tokenizer):
    def tokenize(self, text):
        return words(text)


RAW = RougeScorer(["rougeL"], use_stemmer=False)
WITH_OUR_WORDS = RougeScorer(["rougeL"], tokenizer=OurWords())


def f_measure(one: str, other: str, scorer: RougeScorer = RAW) -> float:
    """Return rouge-score's F without the last digits, which rounding can change (0.7000000000000001 for 7/10)."""
    return round(scorer.score(one, other)["rougeL"].fmeasure, 9)


def decisions_of_a_loop(texts: list[str], threshold: float, scorer: RougeScorer = RAW) -> list[str | None]:
    """Return for each text the earliest kept text that it is similar to, or None."""
    kept, decisions = [], []
    for text in texts:
        similar = next((other for other in kept if f_measure(text, other, scorer) >= threshold), None)
        decisions.append(similar)
        if similar is None:
            kept.append(text)
    return decisions


def decisions_of_the_index(texts: list[str], threshold: float) -> list[str | None]:
    index, decisions = RougeIndex(threshold), []
    for text in texts:
        similar = index.find(text)
        decisions.append(similar and similar.text)
        if similar is None:
            index.add(text)
    return decisions


FEW_WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=14).map(" ".join)
THRESHOLDS = st.sampled_from([0.1, 0.35, 0.5, 0.6, 0.7, 0.85, 0.9, 1.0])


@settings(max_examples=150, deadline=None)
@given(st.lists(FEW_WORDS, max_size=12), THRESHOLDS)
@example(["", "", "a", "a", "A!"], 1.0)
def test_decisions_equal_those_of_a_pairwise_loop(texts, threshold):
    assert decisions_of_the_index(texts, threshold) == decisions_of_a_loop(texts, threshold)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.sampled_from("猫狗写诗 ,。aб"), max_size=12), max_size=12), THRESHOLDS)
def test_decisions_equal_those_of_a_pairwise_loop_in_any_script(texts, threshold):
    assert decisions_of_the_index(texts, threshold) == decisions_of_a_loop(texts, threshold, WITH_OUR_WORDS)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), st.randoms(use_true_random=False), st.integers(0, 8),
    THRESHOLDS,
)  # fmt: skip
def test_decisions_are_exact_for_shuffled_and_shortened_texts(tokens, draw, changes, threshold):
    """Texts with equal words in another order, with lengths at the bound, and with repeated words."""
    changed = list(tokens)
    for _ in range(changes):
        i = draw.randrange(len(changed))
        act = draw.choice(["drop", "double", "swap", "new"])
        if act == "drop" and len(changed) > 1:
            del changed[i]
        elif act == "double":
            changed.insert(i, changed[i])
        elif act == "swap":
            j = draw.randrange(len(changed))
            changed[i], changed[j] = changed[j], changed[i]
        else:
            changed[i] = f"new{draw.randrange(3)}"
    texts = [" ".join(tokens), " ".join(changed)]
    assert decisions_of_the_index(texts, threshold) == decisions_of_a_loop(texts, threshold)
    assert rouge_l(*texts) == pytest.approx(f_measure(*texts), abs=1e-9)


def test_decisions_stay_right_while_the_pool_is_reordered():
    """Words of a Zipf distribution, texts long enough to skip most pairs, and copies changed around the threshold."""
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    texts: list[str] = []
    while len(texts) < 600:
        tokens = draw.choices(vocabulary, weights, k=draw.randint(15, 35))
        if texts and draw.random() < 0.5:
            tokens = draw.choice(texts).split()
            for _ in range(draw.randint(4, 14)):
                tokens[draw.randrange(len(tokens))] = draw.choice(vocabulary)
        texts.append(" ".join(tokens))
    decisions = decisions_of_the_index(texts, 0.7)
    assert decisions.count(None) > 300 and len(decisions) - decisions.count(None) > 100
    kept: dict[str, str] = {}  # one character per word, which makes comparing all pairs fast
    for text, decision in zip(texts, decisions, strict=True):
        one = "".join(chr(0x4E00 + vocabulary.index(word)) for word in text.split())
        similar = (each for each in kept if 20 * LCSseq.similarity(one, each) >= 7 * (len(one) + len(each)))
        assert decision == kept.get(next(similar, ""))
        if decision is None:
            kept[one] = text


@pytest.mark.parametrize(("shared", "first", "second"), [(7, 10, 10), (14, 20, 20), (7, 7, 13), (21, 25, 35)])
def test_exactly_at_the_threshold_is_similar_and_one_word_less_is_not(shared, first, second):
    def text(own: str, common: int, length: int) -> str:
        return " ".join([f"s{i}" for i in range(common)] + [f"{own}{i}" for i in range(length - common)])

    assert Fraction(2 * shared, first + second) == Fraction(7, 10)
    index = RougeIndex(0.7, [text("x", shared, first)])
    similar = index.find(text("y", shared, second))
    assert similar is not None and similar.score == pytest.approx(0.7)
    below = RougeIndex(0.7, [text("x", shared - 1, first)])
    assert below.find(text("y", shared - 1, second)) is None


def test_decisions_do_not_depend_on_rounding():
    """rouge-score gives 0.7000000000000001 or 0.6999999999999998 for some pairs that are exactly at 7/10."""
    scores = set()
    for first in range(7, 60):
        for second in range(7, 60):
            if 7 * (first + second) % 20 == 0 and 7 * (first + second) // 20 <= min(first, second):
                shared = 7 * (first + second) // 20
                precision, recall = shared / first, shared / second
                scores.add(2 * precision * recall / (precision + recall))
    assert min(scores) < 0.7 < max(scores)


def test_text_without_latin_letters_is_compared_too():
    index = RougeIndex(0.7, ["写一首关于春天的诗"])
    assert RAW.score("写一首关于春天的诗", "写一首关于夏天的诗")["rougeL"].fmeasure == 0
    similar = index.find("写一首关于夏天的诗。")
    assert similar is not None and similar.score == pytest.approx(8 / 9)
    assert index.find("请解释光合作用的过程") is None


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1])
def test_a_threshold_must_be_a_share(threshold):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        RougeIndex(threshold)
