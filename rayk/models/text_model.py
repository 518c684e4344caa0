"""The causal language model in a checkpoint: the checkpoint's own model, or the text model of one that also reads
images or audio.

A text model is loaded alone, as a plain causal LM with the text part's configuration, so it trains, serves and saves
like any other.
"""

import copy
from typing import Any

import torch

from rayk.errors import InputError
from rayk.models.types import CausalLM

_PLAIN_TYPES = {
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
}  # fmt: skip
"""Text models without a causal LM in transformers, and the model types that compute the same on text. Their three
position ids (time, height, width) are equal on text, so the sections of the rotary embedding do not matter."""
_SECTIONS = {"mrope_section", "mrope_interleaved", "type"}
_PROBE_TOKENS = 12


def causal_config(settings: Any, name: str) -> Any:
    """Return the configuration of the causal LM in a checkpoint, `settings` itself for a plain text model.

    Args:
        settings: the checkpoint's transformers configuration.
        name: the checkpoint's name in error messages.

    Raises:
        InputError: the checkpoint contains no causal language model, such as an encoder-decoder or an encoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if getattr(settings, "is_encoder_decoder", False):
        raise _refusal(settings, name, "not a causal language model but an encoder-decoder")
    if "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {}):
        return settings
    text = settings.get_text_config(decoder=True)
    if text.model_type in _PLAIN_TYPES:
        values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "rope_scaling")}
        rope = {key: value for key, value in (text.rope_parameters or {}).items() if key not in _SECTIONS}
        rope |= {"rope_type": "default"} if rope.get("rope_type") == "mrope" else {}
        plain = AutoConfig.for_model(_PLAIN_TYPES[text.model_type], **values | {"rope_parameters": rope})
        return _with_tying(plain, settings)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(settings, name, "not a causal language model")
    # Of the models with causal LM classes, only those that are encoders by default, such as BERT, have this field.
    is_encoder = getattr(text, "is_decoder", True) is False
    if is_encoder or getattr(text, "use_bidirectional_attention", None) is True:
        raise _refusal(settings, name, "not a causal language model but an encoder, whose tokens see later ones")
    return _with_tying(text, settings)


def is_text_part(settings: Any, text: Any) -> bool:
    """Return whether `text`, the result of `causal_config`, describes only a part of the checkpoint's model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if text is settings:
        return False
    # Some causal LMs, such as Llama 4's, load their weights from the whole model's checkpoint by themselves.
    own = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    return getattr(own, "config_class", None) is not type(text)


@torch.no_grad()
def take_text_model(whole: Any, text: Any, name: str, options: dict[str, Any]) -> CausalLM:
    """Return the text model of a loaded model that also reads images or audio; the two share memory.

    Args:
        text: the configuration of the text model (`causal_config`).
        name: the checkpoint's name in error messages.
        options: arguments of transformers' `from_config`.

    Raises:
        InputError: the text model computes other logits than the whole model on text.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(text, dtype=whole.dtype, **options)
    body, head = model.base_model, whole.get_output_embeddings()
    problem = "its text model cannot be taken out"
    try:
        body.load_state_dict(whole.get_decoder().state_dict(), assign=True)
        model.get_output_embeddings().load_state_dict(head.state_dict(), assign=True)
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"'{name}' is a {type(whole).__name__}, and {problem}; give a text model.") from error
    model.tie_weights()
    model.generation_config = whole.generation_config
    model.eval(), whole.eval()
    probe = torch.arange(1, _PROBE_TOKENS + 1)[None] % text.vocab_size
    difference = (model(input_ids=probe).logits - whole(input_ids=probe).logits).float().abs().max()
    if not difference <= (1e-3 if whole.dtype == torch.float32 else 0.1) * whole(input_ids=probe).logits.abs().max():
        raise InputError(
            f"'{name}' is a {type(whole).__name__}, and {problem}: its logits on text differ by up to "
            f"{float(difference):.3g}; give a text model."
        )
    return model


def _with_tying(text: Any, settings: Any) -> Any:
    """Return the text model's configuration; of a part, a copy that ties the head as the whole model does."""
    if not is_text_part(settings, text):
        return text
    text = copy.deepcopy(text)
    text.tie_word_embeddings = bool(getattr(settings, "tie_word_embeddings", True))
    return text


def _refusal(settings: Any, name: str, kind: str) -> InputError:
    architecture = (getattr(settings, "architectures", None) or [settings.model_type])[0]
    return InputError(
        f"'{name}' is a {architecture}, {kind}; rayk needs a decoder that predicts the next token, such as a llama, "
        "qwen3 or gemma3 model."
    )
