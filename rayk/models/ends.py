"""The tokens that end a text: a model's own ends, and those that its training teaches."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from rayk.models.types import CausalLM


def end_token_ids(generation_config: Any, tokenizer: Any, trained: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the ids of the tokens that end a completion, without repetitions.

    Args:
        generation_config: the model's; its `eos_token_id` (one id, several or None) are the model's own ends. Without
            any, the tokenizer's EOS is the model's own end.
        trained: the last tokens of the completions that the model is trained on, such as `<|im_end|>` of a chat
            template.
    """
    own = None if generation_config is None else generation_config.eos_token_id
    if own is None:
        own = tokenizer.eos_token_id
    ids = [int(token) for token in np.atleast_1d([] if own is None else own)]
    return tuple(dict.fromkeys([*ids, *map(int, trained)]))


def set_end_token_ids(model: CausalLM, tokenizer: Any, trained: Iterable[int]) -> None:
    """Write the ends of `model` and the `trained` ones into its generation settings, which generation reads and which
    are saved with the model."""
    settings: Any = model.generation_config
    ids = end_token_ids(settings, tokenizer, trained)
    if settings is not None and ids:
        settings.eos_token_id = ids[0] if len(ids) == 1 else list(ids)


def repair_generation_config(generation_config: Any) -> str | None:
    """Change `generation_config` so that transformers saves it; return what was wrong with it, None if nothing was.

    transformers loads generation settings that contradict each other, but refuses to save them. Where options of
    sampling are set, `do_sample` is meant. Otherwise only the special tokens remain.
    """
    problem = generation_problem(generation_config)
    if problem is None:
        return None
    generation_config.do_sample = True
    if generation_problem(generation_config) is not None:
        kept = {name: getattr(generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation_config.__init__(**kept)
    return problem


def generation_problem(generation_config: Any) -> str | None:
    """Return why transformers would refuse to save generation settings; None if it would not."""
    if generation_config is None:
        return None
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None
