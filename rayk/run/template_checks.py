"""Notes on a run's chat template: what is allowed, but maybe not intended."""

from collections.abc import Iterator
from typing import Any

from rayk.config import RunConfig, TeacherConfig
from rayk.data.chat_template import ChatTemplate
from rayk.data.row_texts import RowTexts
from rayk.data.sources import read_rows
from rayk.data.template_differences import templates_differ
from rayk.models import load_tokenizer

_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"})
"""Names that every template may read."""


def renders_chats(config: RunConfig, training: bool) -> bool:
    """Return whether the training rows, or without them the evaluation rows, are rendered in a chat template.

    Args:
        training: the run reads the training rows; those of a synthesis are prompts, which it reads in any case.
    """
    synthesizes = config.synthesis is not None
    source = (config.data.train if training or synthesizes else None) or config.data.evaluation
    if config.data.chat_template or source is None:
        return bool(config.data.chat_template)
    texts, row = RowTexts(source), next(iter(read_rows(source)))
    prompts_only, pairs = not config.method.reads_completions, config.method.reads_pairs
    if synthesizes and source is config.data.train:
        prompts_only, pairs = True, False
    form = texts.format_of(row, prompts_only=prompts_only, pairs=pairs)
    return form == "messages" or (form == "preference" and texts.has_conversations(row))


def chat_template_notes(config: RunConfig, tokenizer: Any, training: bool = True) -> Iterator[str]:
    """Yield a sentence for each variable that the template does not read, for each teacher with another template, and
    if a synthesis leaves out the template in which its rows are trained on.

    Args:
        tokenizer: the student's.
        training: as `renders_chats`.
    """
    template = ChatTemplate.from_settings(config.data, tokenizer)
    if not template.exists or not renders_chats(config, training):
        return
    for name in config.data.chat_template_kwargs:
        if name not in template.variables:
            read = ", ".join(sorted(template.variables - _GIVEN)) or "no variables"
            yield (
                f"data.chat_template_kwargs sets '{name}', which the chat template does not read (it reads: {read}); "
                "it changes nothing, so correct its name or remove it."
            )
    yield from _synthesis_notes(config)
    if getattr(config.method, "alignment", None) is not None:  # each model reads rows in its own template
        return
    for teacher in config.signal_teachers:
        if teacher.model is None or teacher.prompt_template is not None:
            continue
        own = load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
        theirs = ChatTemplate(own, None, config.data.chat_template_kwargs, config.data.chat_template_date)
        if not theirs.exists:
            yield (
                f"Teacher '{teacher.name}' has no chat template, but reads rows in the student's; a teacher without "
                "chat training gives poor signals there."
            )
        elif difference := templates_differ(template, theirs):
            yield (
                f"Teacher '{teacher.name}' was trained on another chat template than the one in which it reads the "
                f"rows ({difference}); signals get worse with it. Set data.chat_template to the teacher's template if "
                "the student may learn it."
            )


def _synthesis_notes(config: RunConfig) -> Iterator[str]:
    synthesis = config.synthesis
    if synthesis is None or synthesis.kind == "magpie" or not config.data.chat_template or synthesis.uses_chat(True):
        return
    for teacher in config.teachers:
        if teacher.name != config.synthesis_teacher or teacher.engine.applies_chat_template or teacher.model is None:
            continue
        if _has_template(teacher):
            yield (
                f"Teacher '{teacher.name}' continues plain prompts, although it has a chat template and "
                "data.chat_template is set; set synthesis.chat to true for a chat model."
            )


def _has_template(teacher: TeacherConfig) -> bool:
    assert teacher.model is not None
    return bool(load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code).chat_template)
