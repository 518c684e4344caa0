"""Having a run's training rows written, and what they depend on."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from rayk.cluster import start_ray
from rayk.config import RunConfig
from rayk.errors import InputError
from rayk.inputs import compared_prompts, filters_of, prompts_written_for, written_rows
from rayk.run.claims import CHOICE, PLACEMENT, located
from rayk.run.serving import applications_of, cpus_needed, serve_all
from rayk.run.watching import Watcher
from rayk.synthesis import Prompt, Store, fingerprint, synthesise
from rayk.teachers import Teacher
from rayk.teachers.cache import SignalCache

_NOT_WRITTEN_WITH = ("prompts", "teacher", "seed_tasks")  # told by what is in them, not by where they are


def synthesize(config: RunConfig, output: str | None = None, watcher: Watcher | None = None) -> dict[str, Any]:
    """Only have `config`'s training rows written, into `<output>/synthesis`; what is there is not asked for again.

    Returns:
        The summary, as `synthesis/summary.json` holds it.

    Raises:
        InputError: there is no `synthesis`, or the settings, data or models are wrong.
        RunFailed, TeacherUnavailable: as `distill`.
    """
    config, watcher = located(config, output), watcher or Watcher()
    if config.synthesis is None:
        raise InputError("synthesis is missing; set synthesis.kind to what a teacher is to write.")
    watcher.stage("Reading data and models")
    prompts = prompts_written_for(config)
    with ExitStack() as stack:
        start_ray(cpus_needed(config))
        write_rows(config, prompts, stack, None, watcher, settled=False)
        summary = Store(written_rows(config).parent).summary
    assert summary is not None
    return summary


def write_rows(
    config: RunConfig, prompts: Sequence[Prompt], stack: ExitStack, cache: SignalCache | None, watcher: Watcher, *,
    settled: bool,
) -> dict[str, Teacher]:  # fmt: skip
    """Have the training rows written, unless they are.

    Args:
        stack: holds the teachers that training needs too; the others come down at once.
        settled: rows are learned from already; prompts that were left unanswered are not asked again.

    Returns:
        The teachers that stay up, by name.
    """
    assert config.synthesis is not None
    with Store(written_rows(config).parent) as store, ExitStack() as staying, ExitStack() as leaving:
        store.claim(_made_with(config, prompts), PLACEMENT, CHOICE)
        if (summary := store.summary) and (settled or not summary["unanswered"]):
            return {}
        filters = filters_of(config)
        if new := [each.name for each in config.teachers if each.name in config.writers and not each.attach]:
            watcher.stage(f"Bringing up {', '.join(new)} on Ray Serve")
        applications = applications_of(config)
        needed = [name for name in config.writers if name not in config.only_writing]
        kept = serve_all(config, applications, staying, cache, needed)
        running = kept | serve_all(config, applications, leaving, cache, [*{*config.writers} - {*needed}])
        before = f", {len(store):,} completions are there" if len(store) else ""
        given = f" for {len(prompts):,} prompts" if len(prompts) > 1 else ""
        watcher.stage(f"Synthesising {config.synthesis.kind}{given}{before}")
        synthesise(
            config.synthesis, prompts, running[config.writer], store, filters, seed=config.seed,
            progress=partial(watcher.progress, unit="completion"), judges=running,
        )  # fmt: skip
        stack.enter_context(staying.pop_all())
        return kept


def _made_with(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What the written rows depend on."""
    values = config.model_dump(mode="json")
    models = {
        teacher["name"]: {"model": teacher["model"] or teacher["name"], "engine": teacher["engine"]}
        for teacher in values["teachers"]
    }
    return {
        "synthesis": {key: value for key, value in values["synthesis"].items() if key not in _NOT_WRITTEN_WITH},
        "seed": config.seed,
        "teachers": models[config.writer],
        "judges": [models[name] for name in config.judges],
        "prompts": fingerprint(prompts),
        "rows": fingerprint(prompts, whole=True),
        "compared": fingerprint(compared_prompts(config)),
    }
