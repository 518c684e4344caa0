import random
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from rayk.config import FilterConfig
from rayk.errors import InputError
from rayk.text import apply_filters, build_filters

FILTERS = TypeAdapter(list[FilterConfig])


def filters(*settings, evaluation=None):
    return build_filters(FILTERS.validate_python(list(settings)), evaluation)


def candidate(completion: str = "An answer.", prompt: str = "A question?", **more):
    return {"prompt": prompt, "completion": completion, "finish_reason": "stop", "tokens": 5} | more


def reason(settings, text, evaluation=None, **more) -> str | None:
    """Return the reason why the filter rejects a candidate with this completion."""
    (only,) = filters(settings, evaluation=evaluation)
    return only.check(candidate(text, **more))


@pytest.mark.parametrize("text", ["", "  \n\t", "\u200b\ufeff", "\u3000"])
def test_text_without_visible_characters_is_empty(text):
    assert reason({"kind": "empty"}, text) == "is empty"


@pytest.mark.parametrize("text", ["x", "猫", "?", "🎉", " 4 "])
def test_text_with_a_visible_character_is_not_empty(text):
    assert reason({"kind": "empty"}, text) is None


def test_truncated():
    assert reason({"kind": "truncated"}, "…", finish_reason="length") == "was truncated at the token limit"
    assert reason({"kind": "truncated"}, "…", finish_reason="stop") is None


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"minimum": 3}, "two words", "has 2 of at least 3 words"),
        ({"minimum": 3}, "now three words", None),
        ({"maximum": 3}, "now they are four", "has 4 of at most 3 words"),
        ({"maximum": 3}, "今天好吗", "has 4 of at most 3 words"),
        ({"unit": "characters", "maximum": 4}, "abcde", "has 5 of at most 4 characters"),
        ({"unit": "tokens", "minimum": 6}, "whatever", "has 5 of at least 6 tokens"),
        ({"field": "prompt", "minimum": 3}, "in the completion", "has 2 of at least 3 words"),
    ],
)
def test_length(settings, text, expected):
    assert reason({"kind": "length"} | settings, text) == expected


ENGLISH = "Give three tips for staying healthy when you travel."
GERMAN = "Nenne drei Tipps, wie man auf Reisen gesund bleibt."
CHINESE = "请给出三个旅行时保持健康的建议。"
RUSSIAN = "Дайте три совета, как оставаться здоровым в путешествии."


@pytest.mark.parametrize(
    ("languages", "kept", "rejected"),
    [
        (["en"], [ENGLISH, "The answer is 42."], [GERMAN, CHINESE, RUSSIAN]),
        (["zh"], [CHINESE, "你好"], [ENGLISH, GERMAN, RUSSIAN]),
        (["de", "en"], [ENGLISH, GERMAN], [CHINESE, RUSSIAN]),
        (["ru"], [RUSSIAN], [ENGLISH, GERMAN, CHINESE]),
    ],
)
def test_language(languages, kept, rejected):
    (only,) = filters({"kind": "language", "languages": languages})
    assert [only.check(candidate(text)) for text in kept] == [None] * len(kept)
    for text in rejected:
        assert "not in " + " or ".join(languages) in (only.check(candidate(text)) or ""), text


@pytest.mark.parametrize("text", ["42", "12 - 4 = 8", "Yes", "x = 3 + 4", "", "🎉", "(B)"])
def test_text_that_is_too_short_for_language_identification_is_kept(text):
    for language in ("en", "zh", "de"):
        assert reason({"kind": "language", "languages": [language]}, text) is None


def test_an_unknown_language_is_named():
    with pytest.raises(InputError, match="does not know the language 'english'; give ISO 639-1 codes such as en"):
        filters({"kind": "language", "languages": ["en", "english"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I think so. " * 20, "repeats 95% of its 4-grams"),
        ("我不知道。" * 20, "repeats 95% of its 4-grams"),
        ("!" * 40, "is 100% one run of '!'"),
        ("Well " + "a" * 60, "is 94% one run of 'a'"),
        ("The sum is 3 + 4 = 7, and twice that is 14, so the answer to the question is 14.", None),
        ("no", None),
        ("", None),
        ("Title\n----------------\nA table of the results follows, with a remark on each of its lines.", None),
    ],
)  # fmt: skip
def test_repetition(text, expected):
    assert reason({"kind": "repetition"}, text) == expected


REFUSED = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but as an AI language model, I cannot browse the internet.",
    "As an AI, I don't have personal opinions.",
    "Unfortunately, I am unable to do this.",
    "I cannot provide instructions for that.",
    "I'm just a language model, so I can't see images.",
    "I don't have access to real-time data.",
    "I must decline.",
    "I am not able to help you with this.",
    "It is against my programming to say so.",
    "I'm not equipped to provide legal advice.",
    "I am simply not equipped to answer that.",
    "I'm not really qualified to help with that.",
    "I'm not equipped to handle personal requests. Please ask a professional.",
    "I'm sorry for the confusion, but I'm not fully equipped to properly diagnose your dog.",
    "As of now, I'm not programmed to make reservations.",
    "I am ill-equipped to judge that.",
    "I'm not equipped with the necessary knowledge of your case.",
    "I'm not equipped for that kind of question.",
    "As a digital assistant, I don't have a favorite film.",
    "I'm just a computer program, so I don't have feelings.",
    "I'm not authorized to share that.",
    "I'm not set up to browse the internet.",
    "I wasn't designed to generate images.",
    "I have not been trained to answer such questions.",
    "I am not capable of providing that.",
    "I'm incapable of accessing files.",
    "I'm not comfortable writing that.",
    "I'm not in a position to give you medical advice.",
    "I won't be able to help you with that.",
    "I lack the tools to open your file.",
    "I don't have the capacity to see pictures.",
    "Sorry, that is beyond the scope of my abilities.",
    "This falls outside my programming.",
    "抱歉,我无法提供相关信息。",
    "很抱歉，我不能回答这个问题。",
    "作为一个人工智能语言模型,我没有个人观点。",
    "申し訳ありませんが、そのご質問にはお答えできません。",
    "Es tut mir leid, aber dabei kann ich dir nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "К сожалению, я не могу ответить на этот вопрос.",
]
ANSWERED = [
    "I'm sorry to hear that you are ill. Drink plenty of water and rest.",
    "You cannot divide by zero, because no number times zero is one.",
    "I can't help falling in love with this city, wrote the poet.",
    "I can't wait to see you at the party on Friday!",
    "I'm not equipped with wings, said the ostrich, but I run fast.",
    "I'm equipped to handle any weather, the hiker said.",
    "I'm not equipped with a raincoat today, so let us take the bus.",
    "I cannot understand why the engine stalls; check the fuel filter first.",
    "I'm not allowed to have pets in my flat, so I feed the birds.",
    "A computer program is a list of instructions that I can run.",
    "As a virtual assistant you will answer mail and keep a calendar. Start with the résumé that I describe here.",
    "We were not designed for the cold, the penguins joked.",
    "The lamp is not designed to provide light outdoors.",
    "I was not built in a day, says Rome.",
    "A soldier is trained to help others, not to lack courage.",
    "It is beyond my window that the garden begins.",
    "I won't be able to forget you, he sang.",
    "An AI model cannot feel pain, but it can describe it.",
    "Als KI bezeichnet man Systeme, die nicht von Hand programmiert sind.",
    "The refund was refused because the policy does not cover it.",
    "我们不能忘记历史的教训。",
    "Je ne peux pas vivre sans toi, dit la chanson.",
    "Sorry is the hardest word.",
    "no",
    "The customer wrote at length about the broken lamp, the delivery that came late and the wrong colour, and asked "
    "what could be done about all of it within the week, since guests were coming. The "
    "shop answered: I cannot help you with that.",
]


@pytest.mark.parametrize("text", REFUSED)
def test_refusals_are_found(text):
    assert (reason({"kind": "refusal"}, text) or "").startswith("refuses: ")


@pytest.mark.parametrize("text", ANSWERED)
def test_other_responses_are_no_refusals(text):
    assert reason({"kind": "refusal"}, text) is None


def test_the_user_adds_refusals():
    settings = {"kind": "refusal", "patterns": [r"\bnon possum\b"]}
    assert reason(settings, "Eheu, NON possum.") == "refuses: 'non possum'"
    with pytest.raises(ValueError, match="is not a regular expression"):
        filters({"kind": "refusal", "patterns": ["("]})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Draw the graph of x.", "graph"),
        ("GO TO the shop", "go to"),
        ("biography, graphs, gotten", None),
        ("看图片说话", "图片"),
        ("图书和照片", None),
        ("Use C++ here", "c++"),
        ("Use C here", None),
        ("用C++写", "c++"),
        ("见http://x", "http://"),
    ],
)
def test_keywords(text, found):
    expected = found and f"contains {found!r}"
    assert reason({"kind": "keywords", "keywords": ["graph", "Go to", "图片", "C++", "http://"]}, text) == expected


QUESTION = "A train leaves the station at nine and travels for three hours at sixty miles an hour; how far?"


def test_token_limits_need_a_token_count():
    for given in (candidate() | {"tokens": None}, {"prompt": "?", "completion": "!"}):
        with pytest.raises(InputError, match="Filter 'length' counts tokens, but the endpoint returns no count"):
            apply_filters([given], filters({"kind": "length", "unit": "tokens"}))


def test_endings():
    assert reason({"kind": "ending"}, "Translate this:\n") == "ends with ':'"
    assert reason({"kind": "ending"}, "翻译：") == "ends with '：'"
    assert reason({"kind": "ending"}, "Note: it is done.") is None
    assert reason({"kind": "ending", "endings": ["…"], "field": "prompt"}, "", prompt="And so…") == "ends with '…'"


def test_contamination_is_a_shared_run_of_words():
    settings = {"kind": "contamination", "n": 8}
    evaluation = [QUESTION, "red fox sees old king", "北京是哪个国家的首都城市呢"]
    found = "shares 'the station at nine and travels for three' with the evaluation set"
    assert (
        reason(settings, "Say: THE STATION at nine, and travels for three days.", evaluation) == f"{found} (completion)"
    )
    assert (
        reason(settings, "yes", evaluation, prompt="x the station at nine and travels for three") == f"{found} (prompt)"
    )
    assert reason(settings, "the station at nine and travels for two", evaluation) is None
    assert reason(settings, "请问北京是哪个国家的首都?", evaluation) is not None
    # An evaluation prompt of fewer than n words only matches an equal text.
    assert reason(settings, "", evaluation, prompt="Red fox sees old king!") is not None
    assert reason(settings, "", evaluation, prompt="a red fox sees old king") is None
    with pytest.raises(InputError, match="set data.evaluation"):
        filters(settings)


def near_duplicates(**settings):
    return filters({"kind": "near_duplicates", "fields": ["completion"]} | settings)


def test_near_duplicates_are_found_at_the_exact_similarity():
    words = [f"w{i}" for i in range(60)]
    close = [*words[:-2], "x", "y"]  # shares 56 of the 60 trigrams of both
    far = [*words[:40], *(f"v{i}" for i in range(20))]
    sifted = apply_filters([candidate(" ".join(each)) for each in (words, close, far, words)], near_duplicates())
    assert [r.candidate["completion"].split()[-1] for r in sifted.rejected] == ["y", "w59"]
    assert sifted.rejected[0].reason.startswith("is a near-duplicate (0.93) of 'w0 w1")
    assert apply_filters(
        [candidate(" ".join(each)) for each in (words, close)], near_duplicates(threshold=0.94)
    ).counts == {"near_duplicates": 0}


def test_equal_texts_are_duplicates_at_every_threshold_and_length():
    for threshold in (0.3, 0.8, 1.0):
        for text in ("42", "two words", "猫", "a b c d e f"):
            sifted = apply_filters(
                [candidate(text), candidate(text.upper()), candidate("other")], near_duplicates(threshold=threshold)
            )
            assert [r.candidate["completion"] for r in sifted.rejected] == [text.upper()]


def test_texts_without_words_are_no_duplicates():
    assert not apply_filters([candidate("!"), candidate("!")], near_duplicates()).rejected


def test_near_duplicates_agree_with_all_pairs():
    draw = random.Random(1)
    texts = []
    for _ in range(300):
        tokens = (
            draw.choice(texts).split()
            if texts and draw.random() < 0.5
            else [f"w{draw.randrange(500)}" for _ in range(40)]
        )
        for _ in range(draw.randrange(4)):
            tokens[draw.randrange(40)] = f"w{draw.randrange(500)}"
        texts.append(" ".join(tokens))

    def shingles(text):
        tokens = text.split()
        return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}

    sifted = apply_filters([candidate(text) for text in texts], near_duplicates())
    kept = [shingles(each["completion"]) for each in sifted.kept]
    similarities = [
        max(
            len(shingles(r.candidate["completion"]) & other) / len(shingles(r.candidate["completion"]) | other)
            for other in kept
        )
        for r in sifted.rejected
    ]
    assert len(similarities) > 50 and min(similarities) >= 0.8
    missed = sum(len(a & b) / len(a | b) >= 0.8 for i, a in enumerate(kept) for b in kept[:i])
    assert missed <= 0.1 * len(similarities)


def test_rouge_compares_prompts_with_those_kept():
    prompts = ["Write a poem about the sea", "Write a poem about the sky", "Explain how engines work"]
    sifted = apply_filters([candidate(prompt=prompt) for prompt in prompts], filters({"kind": "rouge"}))
    assert [each["prompt"] for each in sifted.kept] == [prompts[0], prompts[2]]
    assert sifted.rejected[0].reason == "has ROUGE-L 0.83 to 'Write a poem about the sea'"


def test_rejected_candidates_make_no_duplicates():
    given = filters({"kind": "rouge", "field": "completion"}, {"kind": "truncated"})
    cut, whole = (
        candidate("A long answer that ends well", finish_reason="length"),
        candidate("A long answer that ends well"),
    )
    sifted = apply_filters([cut, whole, whole], given)
    assert sifted.kept == [whole]
    assert [(r.candidate, r.filter) for r in sifted.rejected] == [(cut, "truncated"), (whole, "rouge")]


def test_filters_are_counted_by_name_and_remember_earlier_candidates():
    given = filters(
        {"kind": "length", "minimum": 2}, {"kind": "length", "maximum": 3}, {"kind": "rouge", "field": "completion"}
    )
    sifted = apply_filters(
        [candidate(text) for text in ("one", "two words", "three words here", "now four words here")], given
    )
    assert sifted.counts == {"length 1": 1, "length 2": 1, "rouge": 0}
    assert [(r.filter, r.reason) for r in sifted.rejected] == [
        ("length 1", "has 1 of at least 2 words"),
        ("length 2", "has 4 of at most 3 words"),
    ]
    assert apply_filters([candidate("two words")], given).counts == {"length 1": 0, "length 2": 0, "rouge": 1}


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_judges.py").write_text(
        "def short(candidate):\n    return 'too long for me' if len(candidate['completion']) > 3 else None\n"
        "def truth(candidate):\n    return True\n"
        "def broken(candidate):\n    return candidate['no_such_field']\n"
        "number = 3\n"
    )
    yield "my_judges"
    sys.modules.pop("my_judges", None)


def test_a_users_function_filters(module):
    sifted = apply_filters(
        [candidate("yes"), candidate("never")], filters({"kind": "custom", "function": f"{module}:short"})
    )
    assert [each["completion"] for each in sifted.kept] == ["yes"]
    assert [(r.filter, r.reason) for r in sifted.rejected] == [("custom", "too long for me")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_judges:truth", "returned True; let it return None to accept a candidate"),
        ("my_judges:broken", "failed with KeyError: 'no_such_field'"),
        ("my_judges:absent", "module 'my_judges' has no function 'absent'"),
        ("my_judges:number", "'my_judges:number' is not a function but a int"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_does_not_work_is_named(module, function, message):
    with pytest.raises(InputError, match=message):
        apply_filters([candidate()], filters({"kind": "custom", "function": function}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "length", "minimum": 5, "maximum": 3}, "maximum \\(3\\) is below minimum \\(5\\)"),
        ({"kind": "language", "languages": []}, "languages"),
        ({"kind": "custom", "function": "no_colon"}, "function"),
        ({"kind": "near_duplicates", "threshold": 0}, "threshold"),
        ({"kind": "keyword", "keywords": ["x"]}, "keyword"),
        ({"kind": "keywords", "keywords": []}, "keywords"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        filters(settings)


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="reads the field 'rationale', which the candidate lacks \\(it has: prompt, "):
        reason({"kind": "length", "field": "rationale"}, "x")
    with pytest.raises(InputError, match="reads text, but the field 'tokens' is a int"):
        reason({"kind": "empty", "field": "tokens"}, "x")


def test_the_package_imports_no_heavy_library():
    code = (
        "import rayk.text, sys; print(sorted({'torch', 'ray', 'scipy', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
