"""The openai engine: an OpenAI-compatible endpoint as a black box, with text prompts and text completions.

If the endpoint returns no completion for one prompt after all retries, the other prompts are not affected: that
prompt's `GeneratedSequence` contains the reason. Problems that concern every prompt (the key, the model's name, the
quota) raise an error. Endpoints leave out the stop string that ended a completion.
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
from rayk.config.secrets import hide, remember_secret
from rayk.config.support import Support
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters, Usage
from rayk.engines.batching import gather
from rayk.engines.limits import RateLimit
from rayk.errors import InputError
from rayk.models import Head
from rayk.models.loading import UNLIMITED
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence

TextPrompt = str | list[dict[str, Any]]

logger = logging.getLogger(__name__)

_RETRYABLE = {408, 409, 425, 429}  # and all server errors, from 500 on
_PROMPT_REFUSED = {
    400,
    413,
    422,
    451,
}  # too long, against the rules, …; other statuses concern all prompts
_LONGEST_PAUSE_SECONDS = 120.0
BACKOFF = wait_random_exponential(multiplier=0.5, max=30)
"""Seconds between attempts, in addition to a Retry-After header."""
_CHARACTERS_PER_TOKEN = 4
# Servers differ in the number of bits of a seed; all accept 31.
_HIGHEST_SEED = 2**31 - 1


class _NoCompletion(Exception):
    """A request without a completion.

    Attributes:
        retryable: whether a retry may help.
        pause_seconds: shortest time before a retry.
        refused: whether the endpoint refused the prompt.
    """

    def __init__(self, reason: str, *, retryable: bool, pause_seconds: float = 0.0, refused: bool = False):
        super().__init__(reason)
        self.retryable, self.refused = retryable, refused
        self.pause_seconds = pause_seconds


class OpenAIEngine:
    """Implements `rayk.engines.base.Engine`. All calls must come from one event loop.

    Attributes:
        usage: requests and their cost so far.

    Raises:
        InputError: the key is missing.
    """

    def __init__(self, model: str, settings: OpenAIEngineConfig | None = None):
        self.settings = settings = settings or OpenAIEngineConfig()
        self._key = _read_key(settings.api_key_variable)
        remember_secret(self._key)
        self._url = f"{settings.base_url.rstrip('/')}/{'chat/' if settings.chat else ''}completions"
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx2.Limits(max_connections=settings.concurrency),
            timeout=None,  # httpx's timeout is per read; `_request` limits the whole response
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._request_limit = RateLimit(settings.requests_per_minute)
        self._token_limit = RateLimit(settings.tokens_per_minute)
        self.usage = Usage()
        self.info = EngineInfo(
            model=settings.model_name or model,
            vocab_size=0,
            max_tokens=UNLIMITED,
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
            f"engine kind 'openai' uses {self.info.model} as a black box, which generates text and returns no signals; "
            "use engine kind 'transformers' or 'vllm'."
        )

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        if parameters.top_k:
            raise InputError("OpenAI-compatible endpoints do not support top_k; leave it out, or use top_p.")
        return await gather(
            self._generate_one(self._check_prompt(prompt), parameters, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        )

    def _check_prompt(self, prompt: Prompt) -> TextPrompt:
        if isinstance(prompt, np.ndarray):
            raise InputError("engine kind 'openai' requires prompts as text, not as token ids; decode them first.")
        if not isinstance(prompt, str) and not self.settings.chat:
            raise InputError("Messages need an endpoint with chat completions; set engine.chat: true.")
        if not prompt:
            raise InputError("An empty prompt cannot be continued; give it some text.")
        return prompt

    async def warm_up(self) -> None:
        """Do nothing, because each request costs money."""

    async def check_health(self) -> None:
        """Do nothing, because a new replica would not repair an endpoint."""

    async def _generate_one(self, prompt: TextPrompt, parameters: SamplingParameters, seed: int) -> GeneratedSequence:
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, _NoCompletion) and error.retryable),
            stop=stop_after_attempt(self.settings.attempts), wait=_wait_seconds, reraise=True,
        )  # fmt: skip
        try:
            async with self._slots:
                return await retrying(self._request, prompt, parameters, seed)
        except _NoCompletion as error:
            self.usage.given_up += 1
            logger.warning("%s returned no completion for a prompt: %s", self.info.model, error)
            nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
            return GeneratedSequence(*nothing, "error", "", str(error), error.refused)

    async def _request(self, prompt: TextPrompt, parameters: SamplingParameters, seed: int) -> GeneratedSequence:
        """Send one request as soon as the rate limits allow it."""
        expected = _num_characters(prompt) / _CHARACTERS_PER_TOKEN + parameters.max_new_tokens
        await self._request_limit.acquire(1)
        await self._token_limit.acquire(expected)
        self.usage.requests += 1
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                response = await self._client.post(self._url, json=self._body(prompt, parameters, seed))
        except TimeoutError:
            raise _NoCompletion(f"no response within {self.settings.timeout_seconds:g} s", retryable=True) from None
        except httpx2.HTTPError as error:
            raise _NoCompletion(
                f"the connection failed ({type(error).__name__} at {self.settings.base_url})", retryable=True
            ) from None
        if not response.is_success:
            raise self._status_error(response)
        try:
            content = response.json()
        except ValueError:
            raise _NoCompletion("the response is not JSON", retryable=True) from None
        self._count_usage(content, expected)
        return self._parse(content)

    def _body(self, prompt: TextPrompt, parameters: SamplingParameters, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = self.settings.extra_body | {
            "model": self.info.model,
            "temperature": parameters.temperature,
            "top_p": parameters.top_p,
            "seed": int(seed) & _HIGHEST_SEED,
        }
        if parameters.stop:
            body["stop"] = list(parameters.stop)
        if self.settings.chat:
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            body[self.settings.length_parameter] = parameters.max_new_tokens
            return body | ({"logprobs": True} if self.settings.logprobs else {})
        body |= {"prompt": prompt, "max_tokens": parameters.max_new_tokens}
        return body | ({"logprobs": 1} if self.settings.logprobs else {})

    def _status_error(self, response: httpx2.Response) -> Exception:
        """Return the error for a response whose status is not success."""
        status = response.status_code
        message, code = self._error_message(response)
        endpoint = f"The endpoint {self.settings.base_url}"
        if status in (401, 403):
            return InputError(
                f"{endpoint} refused the key ({status}: {message}); set {self.settings.api_key_variable or 'a key'} "
                f"(the name in engine.api_key_variable) to a key with access to '{self.info.model}'."
            )
        if status == 404:
            return InputError(
                f"{endpoint} does not know '{self.info.model}' (404: {message}); correct engine.base_url, "
                "engine.model_name or engine.chat."
            )
        if code == "insufficient_quota":
            return InputError(
                f"{endpoint} reports that the quota is used up ({status}: {message}); raise it and run again."
            )
        pause = parse_retry_after(response.headers.get("retry-after", ""))
        return _NoCompletion(
            f"{status}: {message}" + (f" (retry after {pause:g} s)" if pause else ""),
            retryable=(status in _RETRYABLE or status >= 500) and pause <= _LONGEST_PAUSE_SECONDS, pause_seconds=pause,
            refused=status in _PROMPT_REFUSED,
        )  # fmt: skip

    def _error_message(self, response: httpx2.Response) -> tuple[str, str]:
        """Return the endpoint's error message and error code. The key is masked, because endpoints may repeat it."""
        try:
            error = response.json()["error"]
            text, code = str(error["message"]), str(error.get("code"))
        except (ValueError, KeyError, TypeError, AttributeError):
            text, code = response.text or response.reason_phrase, ""
        return textwrap.shorten(hide(text), 300, placeholder=" …"), code

    def _count_usage(self, content: Any, expected: float) -> None:
        """Add a response's usage, and correct the rate limit of tokens, from which `expected` tokens were acquired."""
        used = content.get("usage") if isinstance(content, dict) else None
        prompt, completion = (
            (used.get("prompt_tokens"), used.get("completion_tokens", 0)) if isinstance(used, dict) else (None, None)
        )
        if not isinstance(prompt, int) or not isinstance(completion, int):
            return
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        prompt_price, completion_price = (
            self.settings.price_per_million_prompt_tokens, self.settings.price_per_million_completion_tokens
        )  # fmt: skip
        if prompt_price is not None and completion_price is not None:
            cost = (prompt * prompt_price + completion * completion_price) / 1e6
            self.usage.cost = (self.usage.cost or 0.0) + cost
        self._token_limit.release(expected - prompt - completion)

    def _parse(self, content: Any) -> GeneratedSequence:
        """Return the completion in a response.

        Raises:
            _NoCompletion: the response contains no completion, or an incomplete one.
        """
        try:
            choice = content["choices"][0]
            text = choice["message"]["content"] if self.settings.chat else choice["text"]
            finish_reason = choice["finish_reason"]
            thought = _parse_thought(choice["message"]) if self.settings.chat else ""
        except (KeyError, IndexError, TypeError):
            raise _NoCompletion("the response contains no completion", retryable=True) from None
        if text is None and thought:  # the thought took all tokens
            text = ""
        if finish_reason not in ("stop", "length") or not isinstance(text, str):
            is_refusal = self.settings.chat and bool(choice["message"].get("refusal"))
            raise _NoCompletion(
                f"the response contains no whole completion (finish_reason: {finish_reason})",
                retryable=finish_reason is None, refused=finish_reason == "content_filter" or is_refusal,
            )  # fmt: skip
        logprobs = self._parse_logprobs(choice) if self.settings.logprobs and text else np.zeros(0, np.float32)
        return GeneratedSequence(np.zeros(0, np.int32), logprobs, finish_reason, text, thought=thought)

    def _parse_logprobs(self, choice: Any) -> np.ndarray:
        """Return the generated tokens' log-probs, float32 [tokens], in nats."""
        try:
            logprobs = choice["logprobs"]
            values = [t["logprob"] for t in logprobs["content"]] if self.settings.chat else logprobs["token_logprobs"]
            return np.asarray([float(value) for value in values], np.float32)
        except (KeyError, TypeError):
            raise InputError(
                f"The endpoint {self.settings.base_url} returns no log-probs for '{self.info.model}'; leave "
                "'engine.logprobs' out."
            ) from None


def _parse_thought(message: dict[str, Any]) -> str:
    """Return the thought that a server returns apart from the answer; its field has two names."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return thought.strip() if isinstance(thought, str) else ""


def _num_characters(prompt: TextPrompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content"))) for message in prompt)


def _wait_seconds(state: RetryCallState) -> float:
    """Return the seconds until the next attempt; random, so that prompts are not all retried at the same time."""
    assert state.outcome is not None
    return getattr(state.outcome.exception(), "pause_seconds", 0.0) + BACKOFF(state)


def parse_retry_after(header: str) -> float:
    """Return the seconds until the time in a Retry-After header (seconds, or an HTTP date); 0 if there is none."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # not a date, or a date without a time zone
        return 0.0


def _read_key(variable: str | None) -> str:
    """Return the API key in this environment variable; "" if no variable is given.

    Raises:
        InputError: the variable is not set.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()  # secrets read from files end with a newline
    if not key:
        raise InputError(
            f"engine.api_key_variable names {variable}, but this environment variable is not set where the replica "
            "runs; set it, or set engine.api_key_variable to null for an endpoint without keys."
        )
    return key
