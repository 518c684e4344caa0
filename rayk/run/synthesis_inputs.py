"""Read and check the inputs of a synthesis, and locate the rows that it writes."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from rayk.config import DataSource, JudgeFilterConfig, RunConfig
from rayk.config.data import RowFormat
from rayk.data.sources import Row
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer, tokenizer_fingerprint
from rayk.synthesis import Prompt, PromptGeneratingRecipe, check_chat_template, read_prompts
from rayk.synthesis.recipes import find_recipe
from rayk.text import Filter, build_filters


def read_synthesis_prompts(config: RunConfig) -> list[Prompt]:
    """Read the prompts of `config.synthesis`, and check its settings, its teachers and the student.

    Raises:
        InputError: rows cannot be read, or lack a prompt or the right answer that the recipe needs; or a teacher's
            model or a user's function cannot be loaded.
    """
    assert config.synthesis is not None
    teachers = {teacher.name: teacher for teacher in config.teachers if teacher.name in config.synthesis_teachers}
    recipe = find_recipe(config.synthesis)
    recipe.check(config.synthesis, teachers[config.synthesis_teacher])
    for teacher in teachers.values():
        if teacher.gives_signals and teacher.model is not None:
            load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code)
    _check_student_tokenizer(config)
    _check_judges(config)
    if issubclass(recipe, PromptGeneratingRecipe):
        prompts = recipe.seed_prompts(config.synthesis)
        check_student_template(config, [])
        return prompts
    if config.synthesis.prompts is not None:
        source, section = config.synthesis.prompts, "synthesis.prompts."
    else:
        assert config.data.train is not None
        source, section = config.data.train, "data.train."
    answer = getattr(config.synthesis, "answer", None) if config.synthesis.reads_truth else None
    prompts = read_prompts(source, section, answer)
    recipe.check_prompts(prompts)
    _check_conversations(config, prompts)
    check_student_template(config, prompts)
    return prompts


def check_student_template(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Check that the student's chat template can render the rows to be written: one for each sequence of roles.

    Raises:
        InputError: there is no template, or it fails.
    """
    assert config.synthesis is not None
    examples = {tuple(message["role"] for message in prompt.messages): prompt for prompt in reversed(prompts)}
    if not config.data.chat_template and not any(examples):
        return
    student = config.student
    if (name := student.tokenizer or student.model) is None:
        return
    tokenizer = load_tokenizer(name, trust_remote_code=student.trust_remote_code)
    source = DataSource(path="", format="preference" if config.synthesis.writes_pairs else "messages")
    limits = config.data.model_copy(update={"too_long": "skip"})
    rows = RowTokenizer(source, limits, tokenizer)
    for roles, prompt in sorted(examples.items()) or [((), Prompt("What is it?", "a synthesized row", {}))]:
        messages = prompt.messages if roles else ({"role": "user", "content": prompt.text},)
        answers = [[{"role": "assistant", "content": text}] for text in ("It is this.", "It is that.")]
        fields = {"messages": [*messages, *answers[0]]}
        if config.synthesis.writes_pairs:
            fields = {"prompt": list(messages), "chosen": answers[0], "rejected": answers[1]}
        fields |= {"tools": prompt.tools} if prompt.tools else {}
        list(rows.examples([Row(fields, f"data.chat_template, for the student's form of {prompt.where}")]))


def _check_conversations(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Check that a teacher that is to answer conversations reads a chat.

    Raises:
        InputError: it does not.
    """
    assert config.synthesis is not None
    long = next((prompt for prompt in prompts if prompt.has_context), None)
    if long is None:
        return
    teacher = next(teacher for teacher in config.teachers if teacher.name == config.synthesis_teacher)
    if long.tools and teacher.engine.applies_chat_template:
        raise InputError(
            f"{long.where} has tools, but calls of tools by teacher '{teacher.name}', an endpoint, would be lost; "
            "remove such rows, or set tools_field to null to leave the tools out."
        )
    problem = f"{long.where} has {len(long.messages)} messages before its last answer, which only a chat can express"
    if teacher.engine.applies_chat_template:
        if teacher.engine.continues_prompts:
            raise InputError(f"{problem}; set engine.chat: true for teacher '{teacher.name}'.")
    elif config.synthesis.chat is False:
        raise InputError(f"{problem}; leave out synthesis.chat: false.")
    elif teacher.model is not None:
        check_chat_template(load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code), teacher.name)


def _check_judges(config: RunConfig) -> None:
    """Check that the tokenizer of each judge with `chat` has a chat template.

    Raises:
        InputError: a tokenizer has none.
    """
    assert config.synthesis is not None
    for settings in config.synthesis.filters:
        if not isinstance(settings, JudgeFilterConfig):
            continue
        name = settings.teacher or config.synthesis_teacher
        judge = next(teacher for teacher in config.teachers if teacher.name == name)
        if settings.chat and judge.gives_signals and judge.model is not None:
            check_chat_template(load_tokenizer(judge.model, trust_remote_code=judge.trust_remote_code), judge.name)


def _check_student_tokenizer(config: RunConfig) -> None:
    """Check that a student that generates has the same tokenizer in its folder as `student.tokenizer`, with which it is
    trained.

    Raises:
        InputError: the tokenizers differ.
    """
    student = config.student
    if config.synthesis is None or not config.synthesis.reads_student or not (student.model and student.tokenizer):
        return
    in_folder, given = (
        load_tokenizer(name, trust_remote_code=student.trust_remote_code) for name in (student.model, student.tokenizer)
    )
    if tokenizer_fingerprint(in_folder) != tokenizer_fingerprint(given):
        raise InputError(
            f"student.tokenizer '{student.tokenizer}' differs from the tokenizer in '{student.model}', with which the "
            f"student generates for synthesis '{config.synthesis.kind}'; save it there, and remove student.tokenizer."
        )


def build_row_filters(config: RunConfig) -> list[Filter]:
    """Build the filters of the synthesized rows.

    Raises:
        InputError: a filter cannot be built, or the evaluation rows that it needs cannot be read.
    """
    assert config.synthesis is not None
    prompts = [prompt.text for prompt in contamination_prompts(config)]
    return build_filters(config.synthesis.filters, prompts if config.data.evaluation else None)


def contamination_prompts(config: RunConfig) -> list[Prompt]:
    """Return the evaluation prompts that filter `contamination` compares rows with; empty without such a filter.

    Raises:
        InputError: they cannot be read.
    """
    evaluation = config.data.evaluation
    assert config.synthesis is not None
    if evaluation is None or all(settings.kind != "contamination" for settings in config.synthesis.filters):
        return []
    return list(read_prompts(evaluation, "data.evaluation."))


def synthesized_rows_path(config: RunConfig) -> Path:
    """Return the file of the synthesized rows, whether it exists or not."""
    return config.output_path / "synthesis" / "rows.parquet"


def with_synthesized_rows(config: RunConfig) -> RunConfig:
    """Return `config` with the synthesized rows as `data.train`; unchanged without a synthesis.

    Raises:
        InputError: the rows are not synthesized yet.
    """
    if config.synthesis is None:
        return config
    path = synthesized_rows_path(config)
    if not path.with_name("summary.json").exists():
        raise InputError(f"The training rows are not synthesized yet ('{path}'); run `rayk synthesize` first.")
    names = pq.read_schema(path).names
    form: RowFormat = "prompt_completion" if "completion" in names else "messages"
    if config.synthesis.writes_pairs:
        form = "preference"
    rows = DataSource(path=str(path), format=form)
    source = config.synthesis.prompts or config.data.train
    if source is not None and (source.tools_field is None or form == "prompt_completion"):
        rows = rows.model_copy(update={"tools_field": source.tools_field})
    return config.model_copy(update={"data": config.data.model_copy(update={"train": rows})})
