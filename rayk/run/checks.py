"""Checks of a run's rows against its models: lengths, contexts and routes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayk.config import RunConfig
from rayk.config.support import Layers
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.models import max_positions
from rayk.models.layer_states import layer_numbers
from rayk.teachers import Teacher, choose_teacher_name
from rayk.teachers.ensemble import check_ensemble


def check_lengths(
    models: Mapping[str, Any], config: RunConfig, train: ExampleTable | None, evaluation: ExampleTable | None,
    tables: list[ExampleTable],
) -> None:  # fmt: skip
    """Check that rows, evaluation completions and rollouts are not longer than each model's context.

    Args:
        models: transformers configurations by the models' names in error messages.

    Raises:
        InputError: a model's context is too short.
    """
    longest = max((table.longest for table in tables), default=0)
    generation, evaluated, rollout = config.evaluation.generation, 0, 0
    if evaluation is not None and generation is not None:
        evaluated = int(evaluation.prompt_tokens.max()) + generation.max_new_tokens
    if train is not None and config.rollouts is not None:
        _check_prompts(config, train)
        rollout = int(train.prompt_tokens.max()) + config.rollouts.max_tokens
    for name, settings in models.items():
        limit = max_positions(settings)
        if longest > limit:
            raise InputError(
                f"The longest row has {longest} tokens, but {name} takes {limit}; lower data.max_tokens and set "
                "data.too_long to 'skip' or 'truncate'."
            )
        if evaluated > limit:
            raise InputError(
                f"The longest evaluation prompt with its completion may have {evaluated} tokens, but {name} takes "
                f"{limit}; lower evaluation.generation.max_new_tokens."
            )
        if rollout > limit:
            assert config.rollouts is not None
            turns = ", or rollouts.tool.max_turns and max_answer_tokens" if config.rollouts.tool else ""
            raise InputError(
                f"The longest prompt with its rollout may have {rollout} tokens, but {name} takes {limit}; lower "
                f"rollouts.max_new_tokens{turns}."
            )
    _check_policy_lengths(models["the student"], config, max(longest, rollout))


def _check_prompts(config: RunConfig, train: ExampleTable) -> None:
    if not train.prompt_tokens.all():
        row = train[int(np.argmin(train.prompt_tokens))]
        raise InputError(
            f"{row.where} has no prompt, but method '{config.method.kind}' generates completions after the prompts; "
            "give rows with prompts."
        )


def _check_policy_lengths(student: Any, config: RunConfig, longest: int) -> None:
    """Check that rows and rollouts are not longer than the served policy's engine allows.

    Args:
        longest: tokens of the longest row, or prompt with its rollout.
    """
    served = config.rollouts.served if config.rollouts else None
    if served is not None and longest > (limit := served.engine.max_tokens(max_positions(student))):
        raise InputError(
            f"The longest row, or prompt with its rollout, may have {longest} tokens, but the policy takes {limit} on "
            "vLLM; lower rollouts.max_new_tokens or data.max_tokens, or raise rollouts.engine.max_model_len."
        )


def check_demonstrated_lengths(
    models: Mapping[str, Any], config: RunConfig, pool: DemonstrationPool, tables: list[ExampleTable]
) -> None:
    """Check that rows with their demonstrations are not longer than each model's context.

    Raises:
        InputError: a model's context is too short.
    """
    generated = config.evaluation.generation.max_new_tokens if config.evaluation.generation else 0
    longest = max(pool.max_length(list(table)) for table in tables) + generated
    for name, settings in models.items():
        if longest > (limit := max_positions(settings)):
            raise InputError(
                f"A row with its demonstrations and completion may have {longest} tokens, but {name} takes {limit}; "
                "lower data.max_tokens, to which demonstrations are truncated, or method.demonstrations.k."
            )


def check_contexts(models: Mapping[str, Any], config: RunConfig, views: RowViews, tables: list[ExampleTable]) -> None:
    """Check that each teacher's own prompts (`prompt_template`) can be rendered and leave room for the completion.

    Raises:
        InputError: a row lacks a field of the template, or is too long for the teacher.
    """
    for teacher in config.teachers:
        if teacher.prompt_template is None:
            continue
        limit = max_positions(models.get(f"teacher '{teacher.name}'"))
        for row in (answer for table in tables for example in table for answer in example.answers):
            if (length := len(views.apply(row).view(teacher.name))) > limit:
                raise InputError(
                    f"{row.where} has {length} tokens after the prompt of teacher '{teacher.name}', which takes "
                    f"{limit}; shorten teachers.prompt_template, or lower data.max_tokens."
                )


def check_supports(config: RunConfig, attached: Mapping[str, Teacher]) -> None:
    """Check that running teachers return the support that the method requests.

    Raises:
        InputError: one does not.
    """
    support = config.signal_support
    for name in config.signal_teacher_names:
        if support is not None and name in attached and support.kind not in attached[name].info.supports:
            info = attached[name].info
            raise InputError(
                f"The running teacher '{name}' (engine kind '{info.engine}') cannot return support '{support.kind}', "
                f"only {', '.join(info.supports) or 'text'}; use another teacher, or another method or support."
            )


def check_layers(models: Mapping[str, Any], config: RunConfig) -> None:
    """Check that student and teachers have the layers whose states the method reads.

    Raises:
        InputError: one lacks a layer.
    """
    if config.method.student_layers is not None:
        layer_numbers(config.method.student_layers, models["the student"], "the student")
    if isinstance(config.signal_support, Layers):
        for name in config.signal_teacher_names:
            if (settings := models.get(label := f"teacher '{name}'")) is not None:
                layer_numbers(config.signal_support.layers, settings, label)


def check_routes(config: RunConfig, tables: list[ExampleTable]) -> None:
    """Check that an ensemble can combine signals of the support, and that a route selects a teacher for each row.

    Raises:
        InputError: it cannot combine them, a row has no teacher, or no row has the field that chooses teachers.
    """
    support = config.signal_support
    if config.ensemble is not None and support is not None:
        check_ensemble(support, config.ensemble.combine)
    if config.route is None:
        return
    has_field = False
    for table in tables:
        for row in table:
            choose_teacher_name(row, config.route)
            has_field = has_field or row.fields.get(config.route.field) is not None
    if tables and config.route.teachers and not has_field:
        raise InputError(
            f"No row has the field '{config.route.field}', by which route.field chooses the teachers, so all rows "
            f"would have route.default '{config.route.default}'; correct route.field."
        )
