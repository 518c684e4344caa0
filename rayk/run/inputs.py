"""What a run needs before anything is started: tokenizer and rows, held against the models and the settings."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayk.config import DataSource, InContextConfig, JudgeFilterConfig, RunConfig, ServedRollouts, TeacherConfig
from rayk.config.support import Hidden, TopK
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.data.nearest import check_encoder
from rayk.data.sources import read_rows
from rayk.data.tokenizing import RowTokenizer, collect, tokenize
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.evaluation.answers import AnswerScorer
from rayk.evaluation.evaluate import with_prompts
from rayk.evaluation.options import with_options
from rayk.models import load_model_config, load_tokenizer, max_positions, real_vocab_size, tokenizer_fingerprint
from rayk.models.student import architecture, count_planned_parameters
from rayk.retrieval import check_retriever
from rayk.synthesis import RECIPES, Prompt, PromptGeneratingRecipe, check_chat_template, read_prompts
from rayk.teachers import Teacher
from rayk.teachers.ensemble import check_ensemble, name_for
from rayk.text import Filter, build_filters


@dataclass(frozen=True)
class Inputs:
    """What a run needs before anything is started, checked."""

    tokenizer_name: str
    tokenizer: Any
    train: ExampleTable | None
    """None where nothing is to be trained."""
    evaluation: ExampleTable | None
    pretraining: ExampleTable | None = None
    """Plain text learned from beside `train`."""
    views: RowViews = field(default_factory=RowViews)
    """Who shows rows demonstrations, with method `in_context`; which are nearest is not known yet."""


def read_inputs(config: RunConfig, attached: Mapping[str, Teacher], *, training: bool = True) -> Inputs:
    """Load tokenizers and data and check that they and the models fit together, before anything costs time.

    Raises:
        InputError: one sentence on the first thing that is wrong.
    """
    name = find_tokenizer(config, attached)
    tokenizer = load_tokenizer(name, trust_remote_code=config.student.trust_remote_code)
    models = {"the student": architecture(config.student, tokenizer)}
    if config.student.lora is not None:
        count_planned_parameters(config.student, tokenizer)
    for teacher in config.signal_teachers:
        _check_teacher(teacher, attached.get(teacher.name), tokenizer, name)
        if teacher.model:
            models[f"teacher '{teacher.name}'"] = load_model_config(
                teacher.model, trust_remote_code=teacher.trust_remote_code
            )
    support, vocab_size = config.signal_support, real_vocab_size(tokenizer)
    if isinstance(support, TopK) and support.k > vocab_size:
        raise InputError(
            f"method.support.k is {support.k}, but the vocabulary has {vocab_size} tokens; lower it to {vocab_size} at "
            "most."
        )
    rows = {"pairs": getattr(config.method, "reads_pairs", False)}
    prompts_only = not getattr(config.method, "reads_completions", True)
    train_table = None
    if training:
        assert config.data.train is not None
        train_table = tokenize(config.data.train, config.data, tokenizer, prompts_only=prompts_only, **rows)
    evaluation = tokenize(config.data.evaluation, config.data, tokenizer, **rows) if config.data.evaluation else None
    beside = getattr(config.method, "pretraining", None) if training else None
    pretraining = tokenize(beside.data, config.data, tokenizer) if beside else None
    tables = [table for table in (train_table, evaluation, pretraining) if table is not None]
    demonstrations = _demonstrations(config, tokenizer, train_table, tables)
    views = RowViews.from_config(config, tokenizer, demonstrations)
    _check_lengths(models, config, train_table, evaluation, tables)
    if demonstrations is not None:
        _check_demonstrated(models, config, demonstrations, tables)
    _check_contexts(models, config, views, tables)
    _check_many_teachers(config, tables)
    if evaluation is not None:
        scorer = AnswerScorer(config.evaluation, tokenizer)
        for example in [
            *with_prompts(evaluation, config.evaluation, views), *with_options(evaluation, views),
        ]:  # fmt: skip
            scorer.expected(example)
    return Inputs(name, tokenizer, train_table, evaluation, pretraining, views)


def read_synthesis_prompts(config: RunConfig) -> list[Prompt]:
    """The rows that `config.synthesis` has rows written for, held against its settings and its teacher.

    Raises:
        InputError: they cannot be read, or have no prompt or no truth where the recipe needs them; or the teacher's
            model or a function of the user's cannot be loaded.
    """
    assert config.synthesis is not None
    writing = [teacher for teacher in config.teachers if teacher.name in config.synthesis_teachers]
    recipe = RECIPES[config.synthesis.kind]
    recipe.check(config.synthesis, next(teacher for teacher in writing if teacher.name == config.synthesis_teacher))
    for writer in writing:
        if writer.gives_signals and writer.model is not None:
            load_model_config(writer.model, trust_remote_code=writer.trust_remote_code)
    _check_asked_student(config)
    _check_judges(config)
    if issubclass(recipe, PromptGeneratingRecipe):
        return recipe.seed_prompts(config.synthesis)
    if config.synthesis.prompts is not None:
        source, section = config.synthesis.prompts, "synthesis.prompts."
    else:
        assert config.data.train is not None
        source, section = config.data.train, "data.train."
    answer = getattr(config.synthesis, "answer", None) if config.synthesis.reads_truth else None
    return read_prompts(source, section, answer)


def _check_judges(config: RunConfig) -> None:
    """Refuse judges that cannot be asked as they are to be."""
    assert config.synthesis is not None
    for each in config.synthesis.filters:
        if not isinstance(each, JudgeFilterConfig):
            continue
        judge = next(
            teacher for teacher in config.teachers if teacher.name == (each.teacher or config.synthesis_teacher)
        )
        if each.chat and judge.gives_signals and judge.model is not None:
            check_chat_template(load_tokenizer(judge.model, trust_remote_code=judge.trust_remote_code), judge.name)


def _check_asked_student(config: RunConfig) -> None:
    """A student that is asked reads and writes by the tokenizer in its folder, which must be the one it learns by."""
    student = config.student
    if config.synthesis is None or not config.synthesis.reads_student or not (student.model and student.tokenizer):
        return
    own, given = (
        load_tokenizer(name, trust_remote_code=student.trust_remote_code) for name in (student.model, student.tokenizer)
    )
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(given):
        raise InputError(
            f"student.tokenizer '{student.tokenizer}' is not the tokenizer in '{student.model}', by which synthesis "
            f"'{config.synthesis.kind}' has the student write; save it there, and leave student.tokenizer out."
        )


def build_row_filters(config: RunConfig) -> list[Filter]:
    """What judges the rows that are written.

    Raises:
        InputError: a filter cannot be built, or the evaluation rows it needs cannot be read.
    """
    assert config.synthesis is not None
    prompts = [each.text for each in contamination_prompts(config)]
    return build_filters(config.synthesis.filters, prompts if config.data.evaluation else None)


def contamination_prompts(config: RunConfig) -> list[Prompt]:
    """The evaluation prompts that written rows are held against; none where no filter does that.

    Raises:
        InputError: they cannot be read.
    """
    evaluation = config.data.evaluation
    assert config.synthesis is not None
    if evaluation is None or all(each.kind != "contamination" for each in config.synthesis.filters):
        return []
    return list(read_prompts(evaluation, "data.evaluation."))


def synthesized_rows_path(config: RunConfig) -> Path:
    """Where the rows that synthesis makes lie, once it has."""
    return config.output_path / "synthesis" / "rows.parquet"


def with_synthesized_rows(config: RunConfig) -> RunConfig:
    """`config` with the rows its synthesis has made in the place of `data.train`; as it is where it has none.

    Raises:
        InputError: they are not made yet.
    """
    if config.synthesis is None:
        return config
    path = synthesized_rows_path(config)
    if not path.with_name("summary.json").exists():
        raise InputError(f"The training rows are not written yet ('{path}'); run `rayk synthesize` first.")
    rows = DataSource(path=str(path), format="preference" if config.synthesis.writes_pairs else "prompt_completion")
    return config.model_copy(update={"data": config.data.model_copy(update={"train": rows})})


def find_tokenizer(config: RunConfig, attached: Mapping[str, Teacher]) -> str:
    """Where the student's tokenizer comes from."""
    if config.student.tokenizer or config.student.model:
        return config.student.tokenizer or str(config.student.model)
    for teacher in [*config.signal_teachers, *(each for each in config.teachers if each.gives_signals)]:
        return teacher.model or attached[teacher.name].info.model
    raise InputError("student.tokenizer is missing: a student made from 'config' without a teacher needs one; set it.")


def _check_teacher(teacher: TeacherConfig, running: Teacher | None, tokenizer, tokenizer_name: str) -> None:
    if running is not None:
        if running.info.engine == "openai":
            raise InputError(
                f"Teacher '{teacher.name}' is an endpoint: it writes text and gives no signals, and nothing of this "
                "run has it write; leave it out of 'teachers', or name it in 'synthesis'."
            )
        fingerprint = running.info.tokenizer_fingerprint
    else:
        assert teacher.model is not None
        load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code)
        theirs = load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
        fingerprint = tokenizer_fingerprint(theirs)
    if fingerprint != tokenizer_fingerprint(tokenizer):
        raise InputError(
            f"Teacher '{teacher.name}' and the student's tokenizer '{tokenizer_name}' give tokens different ids; "
            "their vocabularies must be the same for methods that compare distributions."
        )


def _check_lengths(
    models: Mapping[str, Any], config: RunConfig, train_table: ExampleTable | None, evaluation: ExampleTable | None,
    tables: list[ExampleTable],
) -> None:  # fmt: skip
    longest = max((table.longest for table in tables), default=0)
    generation, answered, rolled_out = config.evaluation.generation, 0, 0
    if evaluation is not None and generation is not None:
        answered = int(evaluation.prompt_tokens.max()) + generation.max_new_tokens
    if train_table is not None and config.rollouts is not None:
        if not train_table.prompt_tokens.all():
            promptless = train_table[int(np.argmin(train_table.prompt_tokens))]
            raise InputError(
                f"{promptless.where} has no prompt after which method '{config.method.kind}' could write; give rows "
                "with prompts."
            )
        rolled_out = int(train_table.prompt_tokens.max()) + config.rollouts.max_new_tokens
    for name, settings in models.items():
        limit = max_positions(settings)
        if longest > limit:
            raise InputError(
                f"The longest row has {longest} tokens, but {name} takes {limit}; lower data.max_tokens and set "
                "data.too_long to 'skip' or 'truncate'."
            )
        if answered > limit:
            raise InputError(
                f"The longest evaluation prompt with its answer may have {answered} tokens, but {name} takes "
                f"{limit}; lower evaluation.generation.max_new_tokens."
            )
        if rolled_out > limit:
            raise InputError(
                f"The longest prompt with what is written after it may have {rolled_out} tokens, but {name} takes "
                f"{limit}; lower rollouts.max_new_tokens."
            )
    _check_policy_lengths(models["the student"], config, max(longest, rolled_out))


def _check_policy_lengths(student: Any, config: RunConfig, longest: int) -> None:
    """vLLM writes at least a token after whatever it reads, and so takes one less than the model does."""
    if not isinstance(config.rollouts, ServedRollouts) or config.rollouts.engine.kind != "vllm":
        return
    limit = min(max_positions(student), config.rollouts.engine.max_model_len or sys.maxsize) - 1
    if longest > limit:
        raise InputError(
            f"The longest row, or prompt with what is written after it, may have {longest} tokens, but the policy "
            f"takes {limit} on vLLM; lower rollouts.max_new_tokens or data.max_tokens, or raise "
            "rollouts.engine.max_model_len."
        )


def _demonstrations(
    config: RunConfig, tokenizer: Any, train_table: ExampleTable | None, tables: list[ExampleTable]
) -> DemonstrationPool | None:
    """Who shows rows demonstrations; each row of `tables` can be shown some."""
    if not isinstance(config.method, InContextConfig):
        return None
    pool = config.method.demonstrations.pool
    if pool is not None:
        rows = RowTokenizer(pool, config.data, tokenizer, section="method.demonstrations.pool.")
        pool_table = collect(rows, read_rows(pool), pool.path)
    else:
        assert config.data.train is not None
        pool_table = train_table or tokenize(config.data.train, config.data, tokenizer)
    demonstrations = DemonstrationPool(pool_table, config.method, tokenizer, config.data.max_tokens)
    for row in (row for table in tables for row in table):
        demonstrations.check(row)
    if (encoder := config.method.demonstrations.encoder) is not None:
        check_encoder(encoder, "method.demonstrations.encoder")
    if config.retriever is not None and train_table is not None:
        check_retriever(config.retriever, demonstrations, train_table)
    return demonstrations


def _check_demonstrated(
    models: Mapping[str, Any], config: RunConfig, demonstrations: DemonstrationPool, tables: list[ExampleTable]
) -> None:
    written = config.evaluation.generation.max_new_tokens if config.evaluation.generation else 0
    longest = max(demonstrations.max_length(list(table)) for table in tables) + written
    for name, settings in models.items():
        if longest > (limit := max_positions(settings)):
            raise InputError(
                f"A row with its demonstrations and what is written after it may have {longest} tokens, but {name} "
                f"takes {limit}; lower data.max_tokens, beyond which demonstrations are cut off, or "
                "method.demonstrations.k."
            )


def _check_contexts(models: Mapping[str, Any], config: RunConfig, views: RowViews, tables: list[ExampleTable]) -> None:
    """Each teacher's own prompts can be made, and leave room for the completion."""
    for teacher in config.teachers:
        if teacher.prompt_template is None:
            continue
        settings = models.get(f"teacher '{teacher.name}'")
        limit = max_positions(settings)
        for row in (answer for table in tables for each in table for answer in each.answers):
            if (length := len(views.apply(row).view(teacher.name))) > limit:
                raise InputError(
                    f"{row.where} has {length} tokens after the prompt of teacher '{teacher.name}', which takes "
                    f"{limit}; shorten teachers.prompt_template, or lower data.max_tokens."
                )


def _check_many_teachers(config: RunConfig, tables: list[ExampleTable]) -> None:
    support = config.signal_support
    if config.ensemble is not None and support is not None:
        check_ensemble(support, config.ensemble.combine)
    if config.route is None:
        return
    if isinstance(support, Hidden):
        raise InputError("Hidden states of several teachers need several heads; use support 'topk' with 'route'.")
    for row in (row for table in tables for row in table):
        name_for(row, config.route)
