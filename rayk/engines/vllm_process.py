"""Start vLLM's `AsyncLLM` and translate its errors."""

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rayk.config import VLLMEngineConfig
from rayk.errors import EngineDied, InputError

# Use only a part of the machine, because other replicas and students share its cores and memory.
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_CACHE_BYTES = 1 << 30


def start_vllm_engine(
    model: str, settings: VLLMEngineConfig, *, trust_remote_code: bool = False, hidden: bool = False
) -> Any:
    """Start an `AsyncLLM`: one that generates, or with `hidden` one that returns hidden states.

    Raises:
        InputError: vLLM is not installed, or refuses the settings.
    """
    if not torch.cuda.is_available():
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before vLLM is loaded
    try:
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vllm":
            raise
        raise InputError("engine kind 'vllm' needs the vllm package: pip install 'rayk[vllm]'") from error
    arguments: dict[str, Any] = {
        "model": model, "dtype": settings.dtype, "trust_remote_code": trust_remote_code, "max_logprobs": -1,
        "disable_log_stats": True, "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len, "gpu_memory_utilization": settings.gpu_memory_utilization,
    }  # fmt: skip
    if settings.across_nodes:
        arguments["distributed_executor_backend"] = "ray"  # in the placement group of this process
    elif settings.tensor_parallel_size > 1:
        arguments["distributed_executor_backend"] = "mp"  # Ray has assigned the GPUs to this process already
    if current_platform.is_cpu():
        # A seeded request whose prompt is read in parts ends the engine: "CPU Generator does not use offset".
        arguments["enable_chunked_prefill"] = False
        if settings.gpu_memory_utilization is None:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    arguments = {name: value for name, value in arguments.items() if value is not None} | settings.arguments
    if hidden:
        pooler = PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False)
        arguments |= {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    try:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 500, placeholder=" …")
        raise InputError(f"vLLM does not start '{model}' with the settings in 'engine': {reason}") from error
    _keep_prompt_logprobs_as_tensors(engine)
    return engine


@contextmanager
def vllm_errors(model: str) -> Iterator[None]:
    """Translate vLLM's errors into rayk's, because processes without vLLM cannot unpickle vLLM's own.

    Raises:
        EngineDied: vLLM's process for `model` has ended.
        RuntimeError: vLLM failed otherwise.
    """
    from vllm.exceptions import VLLMError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDied(f"vLLM's process for {model} has ended.") from error
    except VLLMError as error:
        raise RuntimeError(f"vLLM failed: {error.__cause__ or error}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise RuntimeError(f"vLLM failed: {error}") from error  # from a call in its workers


class _PromptLogprobs(list[Any]):
    """A prompt's log-probs: tensors (ids, log-probs, ranks) for each part of the prompt."""


def _keep_prompt_logprobs_as_tensors(engine: Any) -> None:
    """Patch vLLM's front end to return prompt log-probs as the tensors that it receives. It would convert them to
    Python numbers one by one, on the event loop that all requests share."""
    processor = engine.output_processor
    process_outputs = processor.process_outputs

    def process_tensors(outputs: list[Any], *arguments: Any, **options: Any) -> Any:
        for output in outputs:
            part, request = output.new_prompt_logprobs_tensors, processor.request_states.get(output.request_id)
            if part is not None and request is not None:
                output.new_prompt_logprobs_tensors = None
                logprobs = request.logprobs_processor
                if not isinstance(logprobs.prompt_logprobs, _PromptLogprobs):
                    logprobs.prompt_logprobs = _PromptLogprobs()
                logprobs.prompt_logprobs.append(part)
        return process_outputs(outputs, *arguments, **options)

    processor.process_outputs = process_tensors
