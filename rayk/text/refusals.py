"""Patterns of refusals at the beginning of a response. Additions are welcome.

Each pattern is searched in the first `BEGINNING` characters of the response, in NFKC and lower case, with ' for every
apostrophe; later in a response the same words are mostly quoted or part of a story. A pattern names the speaker and
what the speaker will not do, not merely an apology or a negation: "I'm sorry to hear that", "You cannot divide by zero"
and "I can't wait" are no refusals.
"""

import re

BEGINNING = 200

_DOING = (
    r"(?:assist|help(?! (?:but|\w+ing)\b)|fulfil|fulfill|comply|provide|answer|respond|engage|generate|create|write"
    r"|produce|do that|support|participate|discuss|offer|complete|perform|share (?:that|this|any|such)|give you"
    r"|(?:access|open|view|see|browse) (?:the |any |your )?(?:internet|web|external|image|file|link|url|video)s?)"
)
_DOING_ING = (
    r"(?:assisting|helping|fulfil?ling|complying|providing|answering|responding|engaging|generating|creating|writing"
    r"|producing|doing that|supporting|participating|discussing|offering|completing|performing|accessing|browsing)"
)
_SYSTEM_DOING = (
    r"(?:handle|process|make|recommend|advise|diagnose|predict|verify|interpret|analy[sz]e|understand|feel|experience"
    r"|have|hold|express|judge|execute|run|send|book|order|translate|tell you|take|carry out|deal with|address)"
)
"""Tasks that only an assistant says it is not equipped for; a person writes "I cannot" about them."""
_LACKING = r"(?:knowledge|information|abilit|capabilit|tools?\b|data\b|expertise|skills?\b|means\b|resources?\b)"
_MADE = r"(?:allowed|permitted|programmed|designed|equipped|authori[sz]ed|qualified|trained|built|intended|set up)"
_MEANS = r"(?:the (?:ability|capability|capacity|tools|means)|access|enough information|real-?time)"
_UNABLE = r"(?:cannot|can't|can not|am not able to|'m not able to|am unable to|'m unable to)"
_MODEL = (
    r"(?:ai|artificial intelligence|large language model|language model|machine learning model|chatbot"
    r"|(?:digital|virtual|text-based) assistant|computer program)"
)

REFUSALS: tuple[str, ...] = (
    # English
    rf"\bi ?{_UNABLE} {_DOING}\b",
    rf"\b(?:sorry|apologi[sz]e|apologies|unfortunately),? (?:but )?(?:as an? [^.,]{{0,40}}, ?)?(?:i|we) ?{_UNABLE}\b",
    rf"\bas an? {_MODEL}\b[^.]{{0,40}}\bi\b[^.]{{0,40}}\b(?:not|cannot|can't|unable|don't|lack)\b",
    rf"\bi(?:'m| am) (?:just |only )?an? {_MODEL}\b[^.]{{0,60}}\b(?:not|cannot|can't|unable|don't|lack)\b",
    rf"\bi (?:do not|don't) have (?:{_MEANS}|personal)\b",
    r"\bi (?:must|have to) (?:decline|refuse)\b",
    rf"\bi(?:'m| am)(?: just| simply| currently)? (?:not |un)(?:\w+ly )?{_MADE} to {_DOING}\b",
    rf"\bi(?:'m| am)(?: just| simply| currently)? (?:not |un|ill-)(?:\w+ly )?(?:equipped|programmed|designed|set up)"
    rf" to (?:\w+ly )?(?:{_DOING}|{_SYSTEM_DOING})\b",
    rf"\bi(?:'m| am) (?:not |un|ill-)(?:\w+ly )?equipped"
    rf" (?:with (?:the |any )?(?:\w+ )?{_LACKING}|for (?:this|that|such)\b)",
    rf"\bi (?:was not|wasn't|have not been|haven't been) {_MADE} to {_DOING}\b",
    rf"\bi(?:'m| am) (?:not comfortable (?:with )?|not capable of |incapable of ){_DOING_ING}\b",
    rf"\bi(?:'m| am) not in (?:a|any) position to {_DOING}\b",
    rf"\bi (?:will not|won't|would not|wouldn't) be able to {_DOING}\b",
    rf"\bi lack {_MEANS}\b",
    r"\b(?:beyond|outside) (?:of )?(?:the scope of )?my (?:capabilit|abilit|programming|training|expertise)",
    r"\b(?:against|violates?) (?:my|our|openai's) (?:programming|guidelines|policy|policies|principles)\b",
    r"^\W*(?:i'm |i am )?sorry,? (?:but )?(?:that|this|the) (?:request|question|task|prompt)\b",
    # Chinese
    r"^.{0,20}(?:我|本人)(?:无法|不能|不可以|没有办法|没办法)(?:为您|为你|给您|给你)?(?:提供|回答|完成|协助|帮助|满足|生成|执行|参与|讨论)",
    r"作为(?:一个|一名)?(?:人工智能|ai|大?语言模型|大模型)[^。]{0,10}我[^。]{0,30}(?:无法|不能|没有|不会|不具备)",
    r"^.{0,12}(?:抱歉|对不起|很遗憾)[,。!]?.{0,12}(?:无法|不能|没办法)",
    # Japanese
    r"(?:申し訳|すみません|ごめんなさい)[^。]{0,30}(?:できません|できかねます|お答え)",
    # German
    r"\b(?:leider|tut mir leid)[^.]{0,40}\b(?:kann|darf|könnte) ich\b[^.]{0,80}\bnicht\b",
    r"\bals (?:ki|künstliche intelligenz|sprachmodell)\b[^.]{0,30}\bich\b[^.]{0,60}\b(?:nicht|keine?n?|unfähig)\b",
    # French
    r"\b(?:désolée?|navrée?|malheureusement),? (?:mais )?je ne (?:peux|puis)\b",
    r"\bje ne (?:peux|puis) (?:malheureusement )?pas (?:vous |t')?(?:aider|répondre|fournir|générer|donner suite)\b",
    r"\ben tant qu(?:'|e )(?:ia|intelligence artificielle|modèle de langage?)\b[^.]{0,9}\bje n[^.]{0,40} (?:pas|aucun)",
    # Spanish
    r"\b(?:lo siento|lamentablemente|disculpa),? (?:pero )?no puedo\b",
    r"\bcomo (?:una? )?(?:ia|inteligencia artificial|modelo de lenguaje)\b[^.]{0,40}\bno (?:puedo|tengo|soy)\b",
    # Russian
    r"\b(?:извините|простите|к сожалению),? (?:но )?я не могу\b",
    r"\bкак (?:ии|искусственный интеллект|языковая модель)\b[^.]{0,30}\bя не\b",
)


def compile_refusals(more: list[str]) -> re.Pattern[str]:
    """Compile the built-in patterns and `more` into one."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in (*REFUSALS, *more)), re.IGNORECASE)
