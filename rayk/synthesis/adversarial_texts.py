"""Prompts and parsers of Lion (Jiang et al. 2023, arXiv 2305.12870): comparisons by a referee, and new instructions.

Pure functions of text. Every prompt has two forms: for a base model it ends where the response begins, after an example
or two; for a chat model (`chat`) it is an instruction.
"""

import re
from collections.abc import Sequence

Scores = tuple[float, float]
"""Scores of two answers, from 1 to 10; higher is better."""

_ANSWERS = """[Request]
{instruction}

[Answer A]
{first}

[Answer B]
{second}
"""
REFEREE_CHAT = f"""Two assistants have answered the request below.

{_ANSWERS}
[End of the answers]

Rate both answers for helpfulness, relevance, accuracy and detail. Each gets a score from 1 to 10; higher is better. \
Which of them comes first here must not count. Write a short assessment of both first. Then end with these two lines, \
a number in the place of each dash:
Score of A: -
Score of B: -"""

REFEREE_BASE = f"""Below, two answers to a request are scored from 1 to 10 for helpfulness, relevance, accuracy and \
detail; higher is better.

[Request]
What is the capital of Australia?

[Answer A]
It is Canberra, which was founded in 1913 as a compromise between Sydney and Melbourne.

[Answer B]
The capital is Sydney.

[Scores]
Score of A: 9
Score of B: 2

{_ANSWERS}
[Scores]
Score of A:"""
REFEREE_STOP = ("\n\n", "\n[")
"""Stop texts after a base model's scores; a chat model's assessment comes before its scores."""

_ALIKE = "The new prompt is about as long and as difficult as the given one, makes sense by itself and can be answered."


def _chat(how: str) -> str:
    return f"""{how} {_ALIKE}

Given prompt:
{{instruction}}

Write only the new prompt: no heading before it, no answer after it."""


def _base(how: str, saying: str, question: str) -> str:
    return f"""{how} {_ALIKE}

Given prompt: Put the saying "Still waters run deep" into French.
New prompt: {saying}

Given prompt: How many hours does a train need for 360 km at 90 km an hour?
New prompt: {question}

Given prompt: {{instruction}}
New prompt:"""


HARD_CHAT = _chat(
    "Take the given prompt as a model and write one new prompt. It belongs to the same domain and asks for the same "
    "type of task, but it is another prompt and no rewording."
)
EASY_CHAT = _chat(
    "Take the given prompt as a starting point and write one new prompt. It belongs to the same domain, but it is "
    "rarer: something from the long tail of that domain that few people would ask."
)
HARD_BASE = _base(
    "Each new prompt belongs to the same domain as the given prompt and asks for the same type of task, but it is "
    "another prompt and no rewording.",
    'Put the saying "A stitch in time saves nine" into Spanish.',
    "How many litres of paint do 48 square metres of wall need if one litre covers 8?",
)
EASY_BASE = _base(
    "Each new prompt belongs to the same domain as the given prompt, but it is rarer: something from the long tail of "
    "that domain that few people would ask.",
    'Put the Basque saying "Izena duen guztia omen da" into Faroese.',
    "How many years does a glacier that moves 0.3 m a day need for the length of its 14 km valley?",
)
NEW_PROMPT_STOP = ("\n\n", "\nGiven prompt:", "\nNew prompt:")
"""Stop texts of a base model; a chat model's new instruction may have paragraphs."""


def referee_prompt(instruction: str, answers: Sequence[str], chat: bool = False, template: str | None = None) -> str:
    """Return the prompt for the scores of two answers in this order."""
    first, second = answers
    template = template or (REFEREE_CHAT if chat else REFEREE_BASE)
    return template.format(instruction=instruction.strip(), first=first.strip(), second=second.strip())


_NUMBER = r"(\d+(?:\.\d+)?)(?![\d.]*\d)(?:\s*/\s*10\b)?(?!\s*/\s*\d)"
_LABELLED = re.compile(
    rf"(?:(?i:assistant|answer|response)\s*#?\s*(?P<word>[AB12])|(?<![\w'’])(?P<letter>[AB]))(?![\w'’])"
    rf"[\s\"'*)\]]*(?:[:=]|(?i:scores?\s*[:=]))[\s\"'*(\[]*{_NUMBER}"
)
_BARE = re.compile(rf"^[\s\"'*#(\[]*{_NUMBER}(?:\s*[,;&|]\s*|\s+and\s+|\s+){_NUMBER}[\s\"'*)\].]*$")


def parse_scores(text: str) -> Scores | None:
    """Return the scores of the answers A and B in the response to `referee_prompt`; None unless both are from 1 to 10.

    The last score with each label counts; a base model's response begins after "Score of A:". Without labels the last
    line that consists of two numbers counts.
    """
    for labelled in (text, f"A: {text}"):
        scores = {"A1B2".find(name) // 2: float(score) for name, score in _labels(labelled)}
        if len(scores) == 2:
            return _within(scores[0], scores[1])
    bare = [found for line in text.splitlines() if (found := _BARE.match(line))]
    return _within(*map(float, bare[-1].groups())) if bare else None


def _labels(text: str) -> list[tuple[str, str]]:
    return [(found["word"] or found["letter"], found[3]) for found in _LABELLED.finditer(text)]


def _within(*scores: float) -> Scores | None:
    return (scores[0], scores[1]) if all(1 <= score <= 10 for score in scores) else None


def new_prompt(instruction: str, hard: bool, chat: bool = False, template: str | None = None) -> str:
    """Return the prompt for a new instruction: of a hard one's domain and type, or rarer than an easy one."""
    if template is None:
        template = (HARD_CHAT if hard else EASY_CHAT) if chat else (HARD_BASE if hard else EASY_BASE)
    return template.format(instruction=instruction.strip() if chat else " ".join(instruction.split()))


_HEADING = re.compile(r"\A[\s*#]*(?:(?:the\s+)?(?:new|created)\s+prompt|prompt)[\s*#]*[:：][\s*]*", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}


def parse_new_prompt(text: str) -> str:
    """Return the instruction in a response, without a heading or quotation marks around it."""
    text = _HEADING.sub("", text, count=1).strip()
    closing = _QUOTES.get(text[:1])
    if closing and text.endswith(closing) and len(text) > 1 and closing not in text[1:-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
