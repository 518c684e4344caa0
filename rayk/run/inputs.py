"""Read a run's tokenizer and rows, and check that they fit the models and the settings, before anything is started."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayk.config import RunConfig, TeacherConfig, check_inputs_exist
from rayk.config.demonstrations import ROW_FORMAT
from rayk.config.paths import RUN_CONFIG
from rayk.config.support import TopK
from rayk.data.chat_template import ChatTemplate
from rayk.data.chunks import open_rows
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.data.nearest import check_encoder
from rayk.data.row_texts import RowTexts
from rayk.data.sources import read_rows
from rayk.data.table_cache import tokenize_once
from rayk.data.tokenizing import RowTokenizer, build_table, tokenize
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.evaluation.answer_scoring import AnswerScorer, settle_answer_type
from rayk.evaluation.evaluate import select_generation_rows
from rayk.evaluation.option_ranking import select_option_rows
from rayk.methods import resolve_method
from rayk.models import load_generation_config, load_model_config, load_tokenizer
from rayk.models.checks import check_student_model, check_teacher_model
from rayk.models.ends import generation_problem
from rayk.models.student import build_model_config, check_student
from rayk.models.text_model import causal_config
from rayk.models.weight_files import check_weight_files
from rayk.retrieval import check_retriever
from rayk.rollouts import Tool
from rayk.run.alignment import check_aligned_rows, make_aligners
from rayk.run.checks import (
    check_contexts,
    check_demonstrated_lengths,
    check_layers,
    check_lengths,
    check_routes,
    check_supports,
)
from rayk.run.template_checks import chat_template_notes, renders_chats
from rayk.run.vocabularies import SharedVocabulary, share_vocabularies
from rayk.teachers import Teacher
from rayk.training.optimizer import check_optimizer, count_steps
from rayk.training.trackers import check_trackers


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run."""

    tokenizer_name: str
    tokenizer: Any
    vocabulary: SharedVocabulary
    train: ExampleTable | None
    """None if nothing is trained."""
    evaluation: ExampleTable | None
    pretraining: ExampleTable | None = None
    """Plain text that is trained on in addition to `train`."""
    views: RowViews = field(default_factory=RowViews)
    """The rows as each model reads them. Demonstrations are not ranked yet."""
    chat_template: str | None = None
    """The text of the template given as `data.chat_template`, which is saved with the student's tokenizer."""
    notes: tuple[str, ...] = ()
    """Sentences for the user on what is allowed, but may not be intended."""

    def complete(self, config: RunConfig) -> RunConfig:
        """Return the settings with what follows from the inputs: the size of the teachers' signals and the type of
        answers."""
        config = self.vocabulary.limit_teachers(config)
        rows = select_generation_rows(self.evaluation or (), config.evaluation, self.views)
        settled = settle_answer_type(config.evaluation, rows, self.tokenizer)
        return config.model_copy(update={"evaluation": settled})

    @property
    def trained_ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end the completions that are trained on."""
        tables = [table for table in (self.train, self.pretraining) if table is not None]
        return tuple(sorted({token for table in tables for token in table.ends}))


def read_inputs(config: RunConfig, attached: Mapping[str, Teacher], *, training: bool = True) -> Inputs:
    """Load the tokenizer and the rows, and check them.

    Args:
        attached: the teachers with `attach: true`, by name.
        training: also read the training rows.

    Raises:
        InputError: rows, models and settings do not fit together.
    """
    check_inputs_exist(config, training=training)
    check_optimizer(config.training)
    check_trackers(config.tracking)
    resolve_method(config.method)  # raises if the user's code cannot be loaded
    name = find_tokenizer(config, attached)
    tokenizer = load_tokenizer(name, trust_remote_code=config.student.trust_remote_code)
    _check_tool(config, tokenizer, training)
    models = _load_model_configs(config, tokenizer)
    student_size = models["the student"].get_text_config().vocab_size
    vocabulary = share_vocabularies(config, attached, tokenizer, name, student_size)
    check_supports(config, attached)
    check_layers(models, config)
    _check_support(config, vocabulary.size)
    train, evaluation, pretraining = read_tables(config, tokenizer, training=training)
    tables = [table for table in (train, evaluation, pretraining) if table is not None]
    vocabulary.check_rows(tables, tokenizer)
    demonstrations = _read_demonstrations(config, tokenizer, train, tables)
    views = RowViews.from_config(config, tokenizer, demonstrations)
    views = replace(views, aligners=make_aligners(config, attached, tokenizer))
    if train is not None:
        check_aligned_rows(config, views, train)
        config.method.check_steps(count_steps(config, len(open_rows(train, config.data.train, config.seed))))
    check_lengths(models, config, train, evaluation, tables)
    if demonstrations is not None:
        check_demonstrated_lengths(models, config, demonstrations, tables)
    check_contexts(models, config, views, tables)
    check_routes(config, tables)
    if evaluation is not None:
        scorer = AnswerScorer(config.evaluation, tokenizer)
        generated = select_generation_rows(evaluation, config.evaluation, views)
        answered = (*generated, *select_option_rows(evaluation, views))
        for example in answered:
            scorer.expected_answers(example)
        if config.evaluation.answers_every_time and not answered:
            assert config.evaluation.keep_best is not None
            raise InputError(
                f"evaluation.keep_best.metric '{config.evaluation.keep_best.metric}' needs answers, but no row of "
                "data.evaluation has a prompt; give rows with prompts, or choose the metric loss."
            )
    template = ChatTemplate.from_settings(config.data, tokenizer).template
    notes = vocabulary.notes + tuple(note for table in tables[:1] for note in vocabulary.describe_rows(table))
    notes += (*chat_template_notes(config, tokenizer, training), *_generation_notes(config), *_following_notes(config))
    return Inputs(name, tokenizer, vocabulary, train, evaluation, pretraining, views, template, notes)


def find_tokenizer(config: RunConfig, attached: Mapping[str, Teacher]) -> str:
    """Return the name or folder of the student's tokenizer: its own, or else a teacher's.

    Raises:
        InputError: neither exists.
    """
    if config.student.tokenizer or config.student.model:
        return config.student.tokenizer or str(config.student.model)
    able = [teacher for teacher in config.teachers if teacher.gives_signals and teacher.follows != "student"]
    for teacher in [*(teacher for teacher in config.signal_teachers if teacher in able), *able]:
        return teacher.model or attached[teacher.name].info.model
    raise InputError("student.tokenizer is missing: a student made from 'config' without a teacher needs one; set it.")


def _load_model_configs(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """Return the transformers configuration of the student and of each teacher, by their names in error messages."""
    models = {"the student": build_model_config(config.student, tokenizer)}
    if config.student.model is not None:
        check_student_model(models["the student"], config.student.model)
    check_student(config.student, tokenizer, continues=config.method.samples_with_teacher)
    for teacher in config.signal_teachers:
        if teacher.follows == "student":
            models[f"teacher '{teacher.name}'"] = models["the student"]
        if teacher.model and teacher.name != config.aligned_teacher:  # it has its own tokens: `rayk.run.alignment`
            models[f"teacher '{teacher.name}'"] = load_model_config(
                teacher.model, trust_remote_code=teacher.trust_remote_code
            )
    for teacher in config.teachers:
        _check_teacher_files(teacher)
    return models


def _check_tool(config: RunConfig, tokenizer: Any, training: bool) -> None:
    """Check that the function of `rollouts.tool` can be loaded, and that its answers fit the rows."""
    if config.rollouts is None or config.rollouts.tool is None or not training:
        return
    Tool(config.rollouts.tool, config.data, tokenizer)
    if not renders_chats(config, training):
        raise InputError(
            "rollouts.tool answers in the chat template, but the rows are not rendered in it; set data.chat_template "
            "to true, or give rows of messages."
        )


def _generation_notes(config: RunConfig) -> Iterator[str]:
    """Yield a sentence on generation settings of the student that cannot be saved as they are."""
    name = config.student.model
    settings = name and load_generation_config(name, trust_remote_code=config.student.trust_remote_code)
    if problem := generation_problem(settings or None):
        yield (
            f"generation_config.json of student.model '{name}' is not valid, so it is repaired in OUTPUT/model: "
            f"{' '.join(problem.split())}"
        )


def _following_notes(config: RunConfig) -> Iterator[str]:
    """Yield a sentence on each teacher whose run has not started, because its directory may be misspelled."""
    for teacher in config.training_teachers:
        if teacher.followed_run is not None and not Path(teacher.followed_run, RUN_CONFIG).is_file():
            yield (
                f"Teacher '{teacher.name}' follows the run in '{teacher.followed_run}', which has not started; until "
                f"its first checkpoint the teacher is '{teacher.model}'."
            )


def _check_teacher_files(teacher: TeacherConfig) -> None:
    """Check that a teacher's weights are complete and can be loaded, if this process can know it."""
    if teacher.model is None or teacher.attach:
        return
    if teacher.engine.kind == "vllm":
        check_weight_files(teacher.model)
    elif teacher.engine.kind == "transformers":
        label = f"Teacher '{teacher.name}'"
        settings = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code)
        causal_config(settings, teacher.model)
        load_generation_config(teacher.model, trust_remote_code=teacher.trust_remote_code)
        check_teacher_model(settings, teacher.model, label)


def _check_support(config: RunConfig, vocab_size: int) -> None:
    support = config.signal_support
    if isinstance(support, TopK) and support.k > vocab_size and not config.method.aligns_tokens:
        raise InputError(
            f"method.support.k is {support.k}, but the vocabulary has {vocab_size} tokens; lower it to {vocab_size} at "
            "most."
        )


def read_tables(
    config: RunConfig, tokenizer: Any, *, training: bool = True, evaluation: bool = True
) -> tuple[ExampleTable | None, ExampleTable | None, ExampleTable | None]:
    """Return the tokenized rows for training and evaluation, and the text for pretraining; None for missing ones.

    Args:
        training, evaluation: whether to read the rows for it.

    Raises:
        InputError: rows cannot be read.
    """
    method, data = config.method, config.data
    train = evaluated = pretraining = None
    if training:
        assert data.train is not None
        train = tokenize_once(
            data.train, data, tokenizer, prompts_only=not method.reads_completions, pairs=method.reads_pairs
        )
        if method.auxiliary_data is not None:
            pretraining = tokenize_once(method.auxiliary_data.data, data, tokenizer)
        open_rows(train, data.train, config.seed)  # raises if the text is too short
    if evaluation and data.evaluation is not None:
        evaluated = tokenize_once(data.evaluation, data, tokenizer, pairs=method.reads_pairs)
    return train, evaluated, pretraining


def _read_demonstrations(
    config: RunConfig, tokenizer: Any, train: ExampleTable | None, tables: list[ExampleTable]
) -> DemonstrationPool | None:
    """Return the pool of demonstrations, checked against each row of `tables`; None for methods without any."""
    settings = config.method.shown_demonstrations
    if settings is None:
        return None
    sources = (settings.pool, config.data.evaluation, None if train is None else config.data.train)
    for source in filter(None, sources):
        first = next(read_rows(source))
        if RowTexts(source).format_of(first) != ROW_FORMAT:
            raise InputError(
                f"{first.where} is a chat, but method '{config.method.kind}' formats rows itself; give rows with text "
                "in their prompt and completion."
            )
    if settings.pool is not None:
        rows = RowTokenizer(settings.pool, config.data, tokenizer, section="method.demonstrations.pool.")
        pool_table = build_table(rows, read_rows(settings.pool), settings.pool.path)
    else:
        assert config.data.train is not None
        pool_table = train or tokenize(config.data.train, config.data, tokenizer)
    pool = DemonstrationPool(pool_table, config.method, tokenizer, config.data.max_tokens)
    for table in tables:
        for row in table:
            pool.check(row)
    if settings.encoder is not None:
        check_encoder(settings.encoder, "method.demonstrations.encoder")
    if config.retriever is not None and train is not None:
        check_retriever(config.retriever, pool, train)
    return pool
