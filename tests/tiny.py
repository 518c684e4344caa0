"""Tiny tokenizers and models for the tests, generated from a seed and never downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, EOS, BOS, END = "<pad>", "<eos>", "<bos>", "<|end|>"

SENTENCES = (
    "Question: Natalia sold 48 clips in April. How many clips did she sell in May?",
    "Answer: She sold 48/2 = 24 clips in May. #### 24",
    "the cat sat on the mat and the dog sat on the log",
    "user assistant system: what is the answer? The answer is 72.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Role markers, an end-of-turn token and a newline after it, as in Qwen's and Phi's templates."""


def tiny_tokenizer(
    folder: Path | str | None = None,
    *,
    vocab_size: int = 384,
    sentences: tuple[str, ...] = SENTENCES,
    bos: bool = False,
    pad_is_eos: bool = False,
    eos: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any text, and save it to `folder` if given.

    The smallest `vocab_size` is 262 (256 bytes and the special tokens). Tokenizers with different `sentences` have
    different merges and token boundaries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS if eos else None,
        pad_token=EOS if pad_is_eos else PAD,
        bos_token=BOS if bos else None,
    )
    fast.chat_template = chat_template
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def tiny_sentencepiece(
    folder: Path | str | None = None, *, vocab_size: int = 420, sentences: tuple[str, ...] = SENTENCES,
    unigram: bool = False, prefix_space: bool = False, chat_template: str | None = None,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """Train a tokenizer as SentencePiece has them (▁ for a space, byte tokens for unknown characters), and save it.

    With `prefix_space`, a space is put before each text, as in Llama 2; otherwise the tokenizer is like Gemma's.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", PAD, EOS, BOS, "<turn>"]
    if unigram:
        words = sorted({part for text in sentences for word in text.split() for part in ("▁" + word, *"▁", *word)})
        pieces = [(token, 0.0) for token in special] + [(token, -9.0) for token in byte_tokens]
        tokenizer = Tokenizer(models.Unigram([*pieces, *((word, -5.0) for word in words)], 0, byte_fallback=True))
        tokenizer.add_special_tokens(special)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if not unigram:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[*special, *byte_tokens], show_progress=False
        )
        tokenizer.train_from_iterator(sentences, trainer)
    # Byte tokens are found in text only by the model's fallback, so they must not be added tokens.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in byte_tokens]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", pad_token=PAD, eos_token=EOS,
        bos_token=BOS, extra_special_tokens=["<turn>"],
    )  # fmt: skip
    fast.chat_template = chat_template
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with BOS that puts a space before each text, as Llama 2's."""
    tokenizer = tiny_tokenizer(bos=True)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.normalizer = normalizers.Prepend(" ")
    return tokenizer


def tiny_model(
    folder: Path | str | None = None,
    *,
    architecture: str = "llama",
    vocab_size: int = 384,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    tie: bool = False,
    peaked: float = 1.0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    positions: int = 512,
) -> torch.nn.Module:
    """Return a causal LM with random weights in eval mode, and save it to `folder` (with `tokenizer`) if given.

    `architecture`: llama, gpt2, qwen2, gemma2 (soft-cap), granite and cohere (logit scales). `peaked` multiplies the
    head's weights (with `tie` also the embeddings'), so that distributions are less flat.
    """
    settings: dict[str, Any] = {"vocab_size": vocab_size, "tie_word_embeddings": tie}
    settings |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if architecture == "gpt2":
        settings |= {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": positions}
    else:
        settings |= {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions}
    settings |= {
        "gemma2": {"head_dim": hidden // 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": hidden // 4},
        "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.25},
    }.get(architecture, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).eval()
        with torch.no_grad():
            # transformers initializes heads with a standard deviation of 0.02, so distributions would be uniform.
            head = model.get_output_embeddings().weight
            head.normal_(std=peaked * hidden**-0.5)
    if folder is not None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return model


def tiny_encoder(
    folder: Path | str, *, tokenizer: PreTrainedTokenizerFast | None = None, hidden: int = 32, layers: int = 2,
    seed: int = 0, positions: int = 512,
) -> str:  # fmt: skip
    """Save a BERT with random weights and a tokenizer that marks ends of texts and pairs, for cross-encoders."""
    tokenizer = tokenizer or tiny_tokenizer(bos=True)
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} $B {EOS}", special_tokens=marks
    )
    settings = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=positions, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Change the trainable parameters of `model`, as training would, and return it."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            waves = torch.arange(parameter.numel(), dtype=torch.float32).add(number).sin()
            parameter.add_(0.1 * waves.reshape(parameter.shape))
    return model


def merge_padding(logprobs, vocab_size):
    """Return log-probs, [..., columns], with the padding of the embedding as one outcome, the last one."""
    padding = logprobs[..., vocab_size:].logsumexp(-1, keepdim=True)
    return torch.cat([logprobs[..., :vocab_size], padding], -1)
