"""Build the engine that a teacher's settings name: a built-in one or a user's own."""

import inspect
from typing import Any, cast

from rayk.config import TeacherConfig
from rayk.config.engines import CustomEngineConfig
from rayk.config.support import SUPPORTS
from rayk.engines.base import Engine, EngineInfo, VerifyingEngine
from rayk.errors import InputError
from rayk.text.functions import describe_error, load_object

ENTRY_POINTS = "rayk.engines"
"""Group of entry points by which installed packages offer engines."""
_SETTING = "teachers.engine.path"
_METHODS = ("score", "head", "generate", "warm_up", "check_health")


def build_engine(config: TeacherConfig) -> Engine:
    """Build the engine of `config.engine.kind` in this process.

    Raises:
        InputError: the model or the engine's class cannot be loaded.
    """
    assert config.model is not None
    if config.engine.kind == "vllm":
        from rayk.engines.vllm import VLLMEngine

        return VLLMEngine(
            config.model, config.engine, trust_remote_code=config.trust_remote_code, vocab_size=config.vocab_size
        )

    if config.engine.kind == "openai":
        from rayk.engines.openai import OpenAIEngine

        return OpenAIEngine(config.model, config.engine)

    if config.engine.kind == "simulated":
        from rayk.engines.simulated import SimulatedEngine

        return SimulatedEngine(
            config.model, config.engine, trust_remote_code=config.trust_remote_code, vocab_size=config.vocab_size
        )

    if config.engine.kind == "custom":
        engine = _build_custom_engine(config.model, config.engine, config.trust_remote_code)
        if config.vocab_size is not None and engine.info.vocab_size > config.vocab_size:
            raise InputError(
                f"{_SETTING}: '{config.engine.path}' returns signals of {engine.info.vocab_size:,} tokens, but the "
                f"student has only {config.vocab_size:,} of them; limit info.vocab_size and the ids of its signals."
            )
        return engine

    from rayk.engines.transformers import TransformersEngine

    set_threads(config)
    return TransformersEngine(
        config.model, config.engine, trust_remote_code=config.trust_remote_code, vocab_size=config.vocab_size
    )


def set_threads(config: TeacherConfig) -> None:
    """Set the threads of this process, which computes on CPUs: `engine.threads`, or the replica's CPUs."""
    import torch

    engine = config.engine
    assert engine.kind == "transformers"
    if engine.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(engine.threads or max(1, int(config.resources.num_cpus)))


def load_engine_class(path: str) -> type[Engine]:
    """Load a user's engine class, 'module:name' or the name of an entry point in group `rayk.engines`.

    Raises:
        InputError: the class cannot be imported, or does not define the methods of `Engine`.
    """
    engine_class: Any = load_object(path, _SETTING, ENTRY_POINTS)
    if not inspect.isclass(engine_class):
        raise InputError(f"{_SETTING}: '{path}' is a {type(engine_class).__name__}, not a class; correct the name.")
    _check_methods(engine_class, _METHODS, path)
    return cast(type[Engine], engine_class)


def _build_custom_engine(model: str, settings: CustomEngineConfig, trust_remote_code: bool) -> Engine:
    engine_class: Any = load_engine_class(settings.path)
    try:
        engine = engine_class(model, settings, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # a user's code can raise anything
        raise InputError(
            f"{_SETTING}: '{settings.path}' cannot be created: {describe_error(error)}; it is called with the model, "
            "the 'engine' section and trust_remote_code."
        ) from error
    info = getattr(engine, "info", None)
    if not isinstance(info, EngineInfo):
        raise InputError(f"{_SETTING}: '{settings.path}' has no 'info'; set it to a rayk.engines.base.EngineInfo.")
    known = [support.kind for support in SUPPORTS]
    if unknown := [kind for kind in info.supports if kind not in known]:
        raise InputError(
            f"{_SETTING}: '{settings.path}' lists the support '{unknown[0]}' in info.supports; it may contain "
            f"{', '.join(map(repr, known))}."
        )
    if settings.signals and not info.supports:
        raise InputError(
            f"{_SETTING}: '{settings.path}' lists no supports in info.supports; list those that 'score' returns, or "
            "set 'signals: false' beside 'path'."
        )
    if settings.signals and info.vocab_size < 1:
        raise InputError(f"{_SETTING}: info.vocab_size of '{settings.path}' is {info.vocab_size}; set the real size.")
    if info.can_verify:
        _check_methods(engine_class, ("verify",), settings.path)
    return engine


def _check_methods(engine_class: type, names: tuple[str, ...], path: str) -> None:
    """Check that a class defines the methods `names`, and that they are asynchronous if those of `VerifyingEngine` are.

    Raises:
        InputError: a method is missing or not asynchronous.
    """
    if missing := [name for name in names if not callable(getattr(engine_class, name, None))]:
        raise InputError(f"{_SETTING}: class '{path}' does not define {', '.join(map(repr, missing))}; add it.")
    for name in names:
        is_async = inspect.iscoroutinefunction(getattr(engine_class, name))
        if inspect.iscoroutinefunction(getattr(VerifyingEngine, name)) and not is_async:
            raise InputError(f"{_SETTING}: method '{name}' of '{path}' is not asynchronous; write 'async def {name}'.")
