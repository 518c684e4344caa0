"""The openai engine: an OpenAI-compatible endpoint as a black box. Text goes in, text comes out.

A prompt that the endpoint does not answer, however often it is asked, costs the others nothing: its continuation says
why. What concerns every prompt (the key, the model's name, the quota) is an error. Of a text that ends a continuation
(`SamplingParameters.stop`) endpoints leave the text itself out.
"""

import asyncio
import logging
import os
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import httpx2
import numpy as np
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from rayk.config import OpenAIEngineConfig
from rayk.config.support import Support
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters, Usage
from rayk.engines.batching import gather
from rayk.engines.limits import RateLimit
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence

logger = logging.getLogger(__name__)

_PASSING = {408, 409, 425, 429}  # and what is wrong with the server itself, from 500 on
_ABOUT_THE_PROMPT = {400, 413, 422, 451}  # too long, against the rules, …; other refusals concern all prompts
_LONGEST_PAUSE_SECONDS = 120.0
_BACKOFF = wait_random_exponential(multiplier=0.5, max=30)
_CHARACTERS_A_TOKEN = 4
# Servers disagree about the width of a seed; all of them take this one.
_HIGHEST_SEED = 2**31 - 1


class _NoAnswer(Exception):
    """Why a request brought no continuation. `passing`: asking again may help, after `pause_seconds` at the least;
    `refused`: it is the prompt's fault."""

    def __init__(self, reason: str, *, passing: bool, pause_seconds: float = 0.0, refused: bool = False):
        super().__init__(reason)
        self.passing, self.refused = passing, refused
        self.pause_seconds = pause_seconds


class OpenAIEngine:
    """See `rayk.engines.base.Engine`. To be used on one event loop.

    Attributes:
        usage: what was asked and paid for so far.

    Raises:
        InputError: the key is missing.
    """

    def __init__(self, model: str, settings: OpenAIEngineConfig | None = None):
        self.settings = settings = settings or OpenAIEngineConfig()
        self._key = _key_in(settings.api_key_variable)
        self._url = f"{settings.base_url.rstrip('/')}/{'chat/' if settings.chat else ''}completions"
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx2.Limits(max_connections=settings.concurrency),
            timeout=None,  # of its own, for each part of an answer
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._requests = RateLimit(settings.requests_per_minute)
        self._tokens = RateLimit(settings.tokens_per_minute)
        self.usage = Usage()
        self.info = EngineInfo(
            model=settings.model_name or model,
            vocab_size=0,
            max_tokens=1 << 30,
            tokenizer_fingerprint="",
            dtype="unknown",
            device="endpoint",
            supports=(),
            engine="openai",
            applies_chat_template=settings.chat,
        )

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        self._refuse_signals()

    def head(self) -> Head:
        self._refuse_signals()

    def _refuse_signals(self) -> NoReturn:
        raise InputError(
            f"engine kind 'openai' asks {self.info.model} as a black box, which writes text and gives no signals; use "
            "engine kind 'transformers' or 'vllm'."
        )

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        if parameters.top_k:
            raise InputError("OpenAI-compatible endpoints take no top_k; leave it out, or use top_p.")
        return await gather(
            self._continued(_text(prompt), parameters, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        )

    async def warm_up(self) -> None:
        """Nothing: a request would be paid for."""

    async def check_health(self) -> None:
        """Nothing: a new replica would not mend a slow endpoint."""

    async def _continued(self, prompt: str, parameters: SamplingParameters, seed: int) -> GeneratedSequence:
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, _NoAnswer) and error.passing),
            stop=stop_after_attempt(self.settings.attempts), wait=_pause, reraise=True,
        )  # fmt: skip
        try:
            async with self._slots:
                return await retrying(self._ask, prompt, parameters, seed)
        except _NoAnswer as error:
            self.usage.given_up += 1
            logger.warning("%s left a prompt unanswered: %s", self.info.model, error)
            return GeneratedSequence(
                np.zeros(0, np.int32), np.zeros(0, np.float32), "error", "", str(error), error.refused
            )

    async def _ask(self, prompt: str, parameters: SamplingParameters, seed: int) -> GeneratedSequence:
        """One request, when the limits allow it."""
        expected = len(prompt) / _CHARACTERS_A_TOKEN + parameters.max_new_tokens
        await self._requests.take(1)
        await self._tokens.take(expected)
        self.usage.requests += 1
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                response = await self._client.post(self._url, json=self._body(prompt, parameters, seed))
        except TimeoutError:
            raise _NoAnswer(f"no answer within {self.settings.timeout_seconds:g} s", passing=True) from None
        except httpx2.HTTPError as error:
            raise _NoAnswer(
                f"the connection failed ({type(error).__name__} at {self.settings.base_url})", passing=True
            ) from None
        if not response.is_success:
            raise self._refusal(response)
        try:
            answer = response.json()
        except ValueError:
            raise _NoAnswer("the answer is not JSON", passing=True) from None
        self._count(answer, expected)
        return self._generated(answer)

    def _body(self, prompt: str, parameters: SamplingParameters, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.info.model,
            "temperature": parameters.temperature,
            "top_p": parameters.top_p,
            "seed": int(seed) & _HIGHEST_SEED,
        }
        if parameters.stop:
            body["stop"] = list(parameters.stop)
        if self.settings.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            body[self.settings.length_parameter] = parameters.max_new_tokens
            return body | ({"logprobs": True} if self.settings.logprobs else {})
        body |= {"prompt": prompt, "max_tokens": parameters.max_new_tokens}
        return body | ({"logprobs": 1} if self.settings.logprobs else {})

    def _refusal(self, response: httpx2.Response) -> Exception:
        """What a status other than success means for the prompt."""
        status = response.status_code
        said, code = self._said(response)
        place = f"The endpoint {self.settings.base_url}"
        if status in (401, 403):
            return InputError(
                f"{place} refused the key ({status}: {said}); set {self.settings.api_key_variable or 'a key'}, which "
                f"engine.api_key_variable names, to one that may use '{self.info.model}'."
            )
        if status == 404:
            return InputError(
                f"{place} does not know '{self.info.model}' (404: {said}); see to engine.base_url, "
                "engine.model_name and engine.chat."
            )
        if code == "insufficient_quota":
            return InputError(f"{place} says the quota is used up ({status}: {said}); raise it and run again.")
        pause = _retry_after_seconds(response.headers.get("retry-after", ""))
        return _NoAnswer(
            f"{status}: {said}" + (f" (to be asked again after {pause:g} s)" if pause else ""),
            passing=(status in _PASSING or status >= 500) and pause <= _LONGEST_PAUSE_SECONDS, pause_seconds=pause,
            refused=status in _ABOUT_THE_PROMPT,
        )  # fmt: skip

    def _said(self, response: httpx2.Response) -> tuple[str, str]:
        """The endpoint's own words, in which it may repeat the key it was sent, and its code for the error."""
        try:
            error = response.json()["error"]
            text, code = str(error["message"]), str(error.get("code"))
        except (ValueError, KeyError, TypeError, AttributeError):
            text, code = response.text or response.reason_phrase, ""
        if self._key:
            text = text.replace(self._key, "***")
        return textwrap.shorten(text, 300, placeholder=" …"), code

    def _count(self, answer: Any, expected: float) -> None:
        """Add what an answer used, of which `expected` tokens were taken from the limit."""
        used = answer.get("usage") if isinstance(answer, dict) else None
        prompt, completion = (
            (used.get("prompt_tokens"), used.get("completion_tokens", 0)) if isinstance(used, dict) else (None, None)
        )
        if not isinstance(prompt, int) or not isinstance(completion, int):
            return
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        each_prompt, each_completion = (
            self.settings.price_per_million_prompt_tokens, self.settings.price_per_million_completion_tokens
        )  # fmt: skip
        if each_prompt is not None and each_completion is not None:
            paid = (prompt * each_prompt + completion * each_completion) / 1e6
            self.usage.cost = (self.usage.cost or 0.0) + paid
        self._tokens.give_back(expected - prompt - completion)

    def _generated(self, answer: Any) -> GeneratedSequence:
        """What an answer says."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if self.settings.chat else choice["text"]
            ended = choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise _NoAnswer("the answer holds no completion", passing=True) from None
        if ended not in ("stop", "length") or not isinstance(text, str):
            raise _NoAnswer(
                f"the answer holds no whole completion (finish_reason: {ended})", passing=ended is None,
                refused=ended == "content_filter" or (self.settings.chat and bool(choice["message"].get("refusal"))),
            )  # fmt: skip
        logprobs = self._logprobs_of(choice) if self.settings.logprobs and text else np.zeros(0, np.float32)
        return GeneratedSequence(np.zeros(0, np.int32), logprobs, ended, text)

    def _logprobs_of(self, choice: Any) -> np.ndarray:
        """float32 [written tokens], in nats."""
        try:
            listed = choice["logprobs"]
            values = [each["logprob"] for each in listed["content"]] if self.settings.chat else listed["token_logprobs"]
            return np.asarray([float(value) for value in values], np.float32)
        except (KeyError, TypeError):
            raise InputError(
                f"The endpoint {self.settings.base_url} gives no log-probs of what '{self.info.model}' writes; leave "
                "'engine.logprobs' out."
            ) from None


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise InputError("engine kind 'openai' takes prompts as text, not as token ids; decode them first.")
    if not prompt:
        raise InputError("An empty prompt cannot be continued; give it some text.")
    return prompt


def _pause(state: RetryCallState) -> float:
    """Seconds before the next attempt; random, so that prompts refused together do not come back together."""
    assert state.outcome is not None
    return getattr(state.outcome.exception(), "pause_seconds", 0.0) + _BACKOFF(state)


def _retry_after_seconds(header: str) -> float:
    """What a Retry-After header (seconds, or an HTTP date) asks to wait; 0 where it says nothing."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date; or one without a zone
        return 0.0


def _key_in(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()  # secrets that come from files end with a newline
    if not key:
        raise InputError(
            f"engine.api_key_variable names {variable}, but no such environment variable is set where the replica "
            "runs; set it, or set engine.api_key_variable to null for an endpoint without keys."
        )
    return key
