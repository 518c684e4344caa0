"""Replica of the served policy that computes with vLLM.

The student's model in this process loads and checks the weights of a version and passes them to vLLM's processes. vLLM
computes all requests with the same weights, so a request of another version waits until no request is running.

The policy's log-probs are vLLM's own: those of generated tokens come with the completion; those of a given sequence,
and the most likely ids at its positions, come from reading the sequence as a prompt.
"""

import asyncio
import copy
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import StudentConfig, VLLMEngineConfig, VLLMPolicyEngineConfig
from rayk.config.support import Logprob, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.checks import logprob_mismatch, probe_sequence
from rayk.engines.vllm import VLLMEngine
from rayk.errors import EngineDied, InputError
from rayk.models import load_model_config
from rayk.models.lora import has_adapter, merged_state_dict
from rayk.rollouts.policy_model import PolicyModel
from rayk.serving.weight_store import PublishedWeights, WeightVersion
from rayk.serving.weights import load_weights


class VLLMBackend:
    """`rayk.rollouts.replica.PolicyBackend` on vLLM."""

    def __init__(self, engine: VLLMEngine, policy_model: PolicyModel):
        """
        Args:
            policy_model: the student's model on the CPU, with the weights that `engine` has.
        """
        self._engine, self._model = engine, policy_model
        self._lock = VersionLock(self._load)
        self._broken: Exception | None = None

    async def answer(
        self, version: WeightVersion, published: PublishedWeights, mode: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        """See `PolicyBackend`."""
        async with self._lock.hold(version, published):
            if isinstance(mode, SamplingParameters):
                prompts, seeds = zip(*items, strict=True)
                parameters = replace(mode, end_token_ids=self._model.eos_token_ids)
                return await self._engine.generate(prompts, parameters, seeds)
            support = TopK(min(mode.k, self._engine.info.vocab_size)) if isinstance(mode, TopK) else Logprob()
            signals = await self._engine.score(items, support)
            values = signals.target_logprobs.numpy() if signals.ids is None else signals.ids.numpy().astype(np.int32)
            return np.split(values, signals.offsets[1:-1].tolist())

    async def check_health(self) -> None:
        """See `PolicyBackend`."""
        await self._engine.check_health()
        if self._broken is not None:
            raise RuntimeError(f"vLLM could not load the student's weights: {self._broken}")

    async def _load(self, version: WeightVersion, published: PublishedWeights) -> None:
        if self._broken is not None:
            raise EngineDied("A replica of the served policy is about to be replaced.")
        weights = await published.weights
        await asyncio.to_thread(load_weights, self._model.model, weights, published.checksum, version)
        try:
            await self._engine.load_weights(full_state_dict(self._model))
        except RuntimeError as error:
            self._broken = error  # vLLM's weights now belong to no version
            raise EngineDied(f"vLLM could not load the student's weights of {version}: {error}") from error


class VersionLock:
    """Lock that requests of the loaded version share. A request of another version waits until they have ended and then
    loads its version; later requests wait for it."""

    def __init__(self, change: Callable[[WeightVersion, PublishedWeights], Awaitable[None]]):
        """
        Args:
            change: loads a version; called while no request runs.
        """
        self._change = change
        self._version: WeightVersion | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._entry = asyncio.Lock()
        self._changing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def hold(self, version: WeightVersion, published: PublishedWeights) -> AsyncIterator[None]:
        """Hold the lock for a request of `version`, which is loaded first if necessary."""
        async with self._entry:
            if self._changing is not None:
                await asyncio.wait([self._changing])  # the request that started it may have been cancelled
            if version != self._version:
                await self._idle.wait()
                self._changing = asyncio.create_task(self._load(version, published))
                await asyncio.shield(self._changing)
            self._running += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _load(self, version: WeightVersion, published: PublishedWeights) -> None:
        self._version = None
        await self._change(version, published)
        self._version = version


async def start_vllm(
    policy_model: PolicyModel, student: StudentConfig, engine: VLLMPolicyEngineConfig, *, tokenizer: str,
    precision: str,
) -> VLLMBackend:  # fmt: skip
    """Start vLLM with the student's initial weights.

    Args:
        policy_model: the student's model on the CPU.
        precision: dtype of the training step.

    Raises:
        InputError: vLLM does not start, or its log-probs differ from those of transformers.
    """
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "load_format": "dummy"}
    if _has_padded_vocabulary(policy_model):
        overrides = engine.arguments.get("hf_overrides", {})
        arguments["hf_overrides"] = overrides | {"vocab_size": policy_model.vocab_size}
    settings = VLLMEngineConfig(
        dtype="bfloat16" if "bfloat16" in (precision, student.dtype) else "float32",
        tensor_parallel_size=engine.tensor_parallel_size, pipeline_parallel_size=engine.pipeline_parallel_size,
        data_parallel_size=engine.data_parallel_size, expert_parallel=engine.expert_parallel,
        max_model_len=engine.max_model_len, gpu_memory_utilization=engine.gpu_memory_utilization,
        arguments=engine.arguments | arguments,
    )  # fmt: skip
    origin = _own_checkpoint(policy_model, student)
    with nullcontext(origin) if origin is not None else tempfile.TemporaryDirectory() as folder:
        if folder is not origin:
            config = copy.copy(policy_model.model.config)
            config.architectures = [type(policy_model.model).__name__]  # otherwise vLLM would guess it
            config.save_pretrained(folder)
        started = VLLMEngine(str(folder), settings, trust_remote_code=student.trust_remote_code)
    await _load_and_compare(started, policy_model)
    return VLLMBackend(started, policy_model)


def _own_checkpoint(policy_model: PolicyModel, student: StudentConfig) -> str | None:
    """Return the folder or hub id whose configuration describes the student's model; None if it is only a part of that
    model, or has none."""
    origin = student.model or student.config
    if not isinstance(origin, str) or student.layers is not None:
        return None
    described = load_model_config(origin, trust_remote_code=student.trust_remote_code)
    return origin if type(described) is type(policy_model.model.config) else None


def full_state_dict(policy_model: PolicyModel) -> dict[str, Tensor]:
    """Return each tensor of the student's model once, under its name in a checkpoint, with an adapter merged.

    The padding of the vocabulary (rows of ids without a token) is left out, so that vLLM's probabilities are over the
    real vocabulary.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = policy_model.model
    vocabulary = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if module is model.get_input_embeddings() or module is model.get_output_embeddings()
    )
    state: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in (merged_state_dict(model) if has_adapter(model) else model.state_dict()).items():
        if (storage := (tensor.data_ptr(), tensor.shape)) not in seen:
            state[name] = tensor
        seen.add(storage)
    if _has_padded_vocabulary(policy_model):
        state |= {name: state[name][: policy_model.vocab_size] for name in state if name.startswith(vocabulary)}
    return revert_weight_conversion(model, state)


def _has_padded_vocabulary(policy_model: PolicyModel) -> bool:
    """Return whether embedding and head have rows of ids without a token, and vLLM reads the size of the vocabulary
    from the top-level configuration."""
    config = policy_model.model.config
    return config.get_text_config() is config and config.vocab_size > policy_model.vocab_size


async def _load_and_compare(engine: VLLMEngine, policy_model: PolicyModel) -> None:
    """Load the initial weights into vLLM, and compare its log-probs with those of transformers, because vLLM only warns
    about a missing tensor.

    Raises:
        InputError: vLLM cannot load the weights, or the log-probs differ.
    """
    sequence = probe_sequence(engine.info)
    try:
        await engine.load_weights(full_state_dict(policy_model))
        vllm_logprobs = (await engine.score([sequence], Logprob())).target_logprobs
    except RuntimeError as error:
        raise InputError(f"vLLM cannot run {engine.info.model} with the student's weights: {error}") from error
    with policy_model.inference_context():
        expected = torch.from_numpy(policy_model.logprobs([sequence])[0])
    if difference := logprob_mismatch(expected, vllm_logprobs, engine.info.dtype):
        raise InputError(
            f"vLLM's log-probs of the student {engine.info.model} differ from those of transformers with the same "
            f"weights (by up to {difference:.2g} nats); use rollouts.engine.kind 'transformers', and please report the "
            "architecture."
        )
