"""A policy's replica that writes with vLLM.

Weights of a version are taken over by the student's model in this process, which checks them, and handed to vLLM's
processes from there. vLLM computes for all requests together, so those of another version wait until it is idle.

vLLM's own numbers are the policy's: log-probs of what it writes come with the text, those of a given sequence and the
likeliest ids at its positions from reading it as a prompt.
"""

import asyncio
import copy
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import StudentConfig, VLLMEngineConfig, VLLMPolicyEngineConfig
from rayk.config.support import Logprob, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.vllm import WORKER_EXTENSION, VLLMEngine, logprob_mismatch, probe
from rayk.errors import EngineDied, InputError
from rayk.models.lora import has_adapter, merged_state_dict
from rayk.rollouts.policy_model import PolicyModel
from rayk.serving.weight_store import PublishedWeights, WeightVersion
from rayk.serving.weights import load_weights


class VLLMBackend:
    """See `rayk.rollouts.replica.PolicyBackend`."""

    def __init__(self, engine: VLLMEngine, writer: PolicyModel):
        """
        Args:
            writer: of the student's model on the CPU, which has the weights that `engine` has.
        """
        self._engine, self._writer = engine, writer
        self._lock = VersionLock(self._take_over)
        self._broken: Exception | None = None

    async def answer(
        self, version: WeightVersion, published: PublishedWeights, how: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        """See `PolicyBackend`."""
        async with self._lock.hold(version, published):
            if isinstance(how, SamplingParameters):
                prompts, seeds = zip(*items, strict=True)
                return await self._engine.generate(prompts, how, seeds)
            support = TopK(min(how.k, self._engine.info.vocab_size)) if isinstance(how, TopK) else Logprob()
            signals = await self._engine.score(items, support)
            values = signals.target_logprobs.numpy() if signals.ids is None else signals.ids.numpy().astype(np.int32)
            return np.split(values, signals.offsets[1:-1].tolist())

    async def check_health(self) -> None:
        """See `PolicyBackend`."""
        await self._engine.check_health()
        if self._broken is not None:
            raise RuntimeError(f"vLLM did not take over the student's weights: {self._broken}")

    async def _take_over(self, version: WeightVersion, published: PublishedWeights) -> None:
        if self._broken is not None:
            raise EngineDied("A replica of the served policy is about to be replaced.")
        weights = await published.weights
        await asyncio.to_thread(load_weights, self._writer.model, weights, published.checksum, version)
        try:
            await self._engine.load_weights(whole_weights(self._writer))
        except RuntimeError as error:
            self._broken = error  # what vLLM holds now is of no version
            raise EngineDied(f"vLLM did not take over the student's weights of {version}: {error}") from error


class VersionLock:
    """Requests of one version run together; one of another version waits until they have ended, and those that come
    after it wait for it."""

    def __init__(self, change: Callable[[WeightVersion, PublishedWeights], Awaitable[None]]):
        """
        Args:
            change: brings a version about, while nothing runs.
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
        """Held while a request of `version` is answered."""
        async with self._entry:
            if self._changing is not None:
                await asyncio.wait([self._changing])  # whoever wanted it may have gone
            if version != self._version:
                await self._idle.wait()
                self._changing = asyncio.create_task(self._become(version, published))
                await asyncio.shield(self._changing)
            self._running += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _become(self, version: WeightVersion, published: PublishedWeights) -> None:
        self._version = None
        await self._change(version, published)
        self._version = version


async def start_vllm(
    writer: PolicyModel, student: StudentConfig, engine: VLLMPolicyEngineConfig, *, tokenizer: str, precision: str
) -> VLLMBackend:
    """vLLM with the weights of the student as it begins.

    Args:
        writer: of the student's model on the CPU.
        precision: what training computes in.

    Raises:
        InputError: vLLM does not start, or does not make of the weights what transformers makes of them.
    """
    own: dict[str, Any] = {"tokenizer": tokenizer, "load_format": "dummy", "worker_extension_cls": WORKER_EXTENSION}
    if _is_padded(writer):
        own["hf_overrides"] = engine.arguments.get("hf_overrides", {}) | {"vocab_size": writer.vocab_size}
    settings = VLLMEngineConfig(
        dtype="bfloat16" if "bfloat16" in (precision, student.dtype) else "float32",
        tensor_parallel_size=engine.tensor_parallel_size, max_model_len=engine.max_model_len,
        gpu_memory_utilization=engine.gpu_memory_utilization, arguments=engine.arguments | own,
    )  # fmt: skip
    origin = student.model or student.config
    with nullcontext(origin) if isinstance(origin, str) else tempfile.TemporaryDirectory() as folder:
        if folder is not origin:
            described = copy.copy(writer.model.config)
            described.architectures = [type(writer.model).__name__]  # without it vLLM makes a guess
            described.save_pretrained(folder)
        started = VLLMEngine(str(folder), settings, trust_remote_code=student.trust_remote_code)
    await _hand_over(started, writer)
    return VLLMBackend(started, writer)


def whole_weights(writer: PolicyModel) -> dict[str, Tensor]:
    """Every tensor of the student's model once, an adapter merged, under its name in a checkpoint; no rows for ids that
    are no tokens, so that vLLM's probabilities are those among the real ones."""
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = writer.model
    vocabulary = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if module is model.get_input_embeddings() or module is model.get_output_embeddings()
    )
    found: dict[str, Tensor] = {}
    places = set()
    for name, tensor in (merged_state_dict(model) if has_adapter(model) else model.state_dict()).items():
        if (place := (tensor.data_ptr(), tensor.shape)) not in places:
            found[name] = tensor
        places.add(place)
    if _is_padded(writer):
        found |= {name: found[name][: writer.vocab_size] for name in found if name.startswith(vocabulary)}
    return revert_weight_conversion(model, found)


def _is_padded(writer: PolicyModel) -> bool:
    """Whether embedding and head have rows that are no tokens, and the configuration says so where vLLM reads it."""
    settings = writer.model.config
    return settings.get_text_config() is settings and settings.vocab_size > writer.vocab_size


async def _hand_over(engine: VLLMEngine, writer: PolicyModel) -> None:
    """The first weights, and a look at what vLLM makes of them: of a tensor that it was not given it just warns."""
    sequence = probe(engine.info)
    try:
        await engine.load_weights(whole_weights(writer))
        theirs = (await engine.score([sequence], Logprob())).target_logprobs
    except RuntimeError as error:
        raise InputError(f"vLLM cannot write as {engine.info.model} with the student's weights: {error}") from error
    with writer.computing():
        own = torch.from_numpy(writer.logprobs([sequence])[0])
    if off := logprob_mismatch(own, theirs, engine.info.dtype):
        raise InputError(
            f"vLLM's log-probs of the student {engine.info.model} are not those of transformers with the same weights "
            f"(off by up to {off:.2g} nats); use rollouts.engine.kind 'transformers', and please report the "
            "architecture."
        )
