"""Start vLLM's `AsyncLLM` and translate its errors."""

import multiprocessing
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from rayk.config import VLLMEngineConfig
from rayk.engines.vllm_worker import WORKER_EXTENSION
from rayk.errors import EngineDied, InputError

# Use only a part of the machine, because other replicas and students share its cores and memory.
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_CACHE_BYTES = 1 << 30
# vLLM's own defaults on large GPUs for work that, like scoring, waits for no user; its server's are 2,048 and 128.
_GPU_BATCH = {"max_num_batched_tokens": 16_384, "max_num_seqs": 1_024}


def start_vllm_engine(model: str, settings: VLLMEngineConfig, *, trust_remote_code: bool = False) -> Any:
    """Start an `AsyncLLM`.

    Raises:
        InputError: vLLM is not installed, or refuses the settings.
    """
    if not torch.cuda.is_available():
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before vLLM is loaded
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vllm":
            raise
        raise InputError("engine kind 'vllm' needs the vllm package: pip install 'rayk[vllm]'") from error
    arguments: dict[str, Any] = {
        "model": model, "dtype": settings.dtype, "trust_remote_code": trust_remote_code, "disable_log_stats": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size, "data_parallel_size": settings.data_parallel_size,
        "enable_expert_parallel": settings.expert_parallel, "quantization": settings.quantization,
        "max_model_len": settings.max_model_len, "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_batched_tokens": settings.batch_tokens, "max_num_seqs": settings.max_sequences,
    }  # fmt: skip
    if settings.across_nodes:
        arguments["distributed_executor_backend"] = "ray"  # in the placement group of this process
    elif settings.gpus > 1:
        arguments["distributed_executor_backend"] = "mp"  # Ray has assigned the GPUs to this process already
    if current_platform.is_cpu():
        # A seeded request whose prompt is read in parts ends the engine: "CPU Generator does not use offset".
        arguments["enable_chunked_prefill"] = False
        if settings.gpu_memory_utilization is None:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not current_platform.is_cpu():
        arguments = _GPU_BATCH | arguments
        if settings.max_sequences is None:
            arguments["max_num_seqs"] = min(arguments["max_num_seqs"], arguments["max_num_batched_tokens"])
    arguments |= settings.arguments
    arguments["worker_extension_cls"] = WORKER_EXTENSION
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 500, placeholder=" …")
        raise InputError(f"vLLM does not start '{model}' with the settings in 'engine': {reason}") from error


def kill_vllm_processes() -> None:
    """Kill vLLM's processes of this process: those that hang do not end otherwise, and occupy memory."""
    import psutil  # type: ignore[import-untyped]  # vLLM requires it

    for core in multiprocessing.active_children():
        if core.name.startswith("EngineCore") and core.pid is not None:
            workers = psutil.Process(core.pid).children(recursive=True)
            core.kill()
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()


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
