"""Settings and prompts for the tests of synthesis."""

from rayk.synthesis import Prompt


def engine_of(endpoint, **changed):
    return {
        "kind": "openai", "base_url": endpoint.url, "api_key_variable": None, "attempts": 2, "timeout_seconds": 20,
        "price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 1.0, **changed,
    }  # fmt: skip


def prompts_of(*texts, **fields):
    return [Prompt(text, f"rows.jsonl, line {line}", {"prompt": text, **fields}) for line, text in enumerate(texts, 1)]
