"""Tools for artificial languages of a few words: a tokenizer with one token per word, model configs, rows on disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word; ``encode`` adds no special tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def llama_config(words: Sequence[str], *, hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """Return the config of a llama over `words`; `intermediate` is the width inside its feed-forward layers."""
    return {
        "model_type": "llama",
        "vocab_size": len(words),
        "max_position_embeddings": 128,
        "pad_token_id": words.index(PAD),
        "eos_token_id": words.index(EOS),
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines; return `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
