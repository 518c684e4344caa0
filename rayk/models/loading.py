"""Load causal language models, tokenizers and model configurations from a local folder or a hub id."""

import json
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayk.config.paths import is_local_path
from rayk.errors import InputError, RunFailed
from rayk.models.head import Head, check_head, get_head
from rayk.models.hub import hub_problem
from rayk.models.packing import enable_packing
from rayk.models.text_model import causal_config, is_text_part, take_text_model
from rayk.models.types import DTYPES, CausalLM

UNLIMITED = 1 << 30
"""Length limit of a model whose configuration has none."""


def load_model(
    name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False,
    attention: str | None = None, device_map: str | None = None,
) -> CausalLM:  # fmt: skip
    """Load a causal LM from a local folder or a hub id to `device`, and check its head. Of a model that also reads
    images or audio, only the text model is returned.

    Args:
        attention: transformers' `attn_implementation`; None: the fastest that computes what the configuration says.
        device_map: transformers' way to spread the layers over all GPUs that this process sees; None: all on `device`.

    Raises:
        InputError: the folder or id contains no causal language model, or not all of its weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    settings = load_model_config(name, trust_remote_code=trust_remote_code)
    text = causal_config(settings, name)
    options = attention_options(text, attention)
    if device_map is not None:
        options["device_map"] = device_map
    is_part = is_text_part(settings, text)
    model, report = _from_pretrained(
        AutoModelForMultimodalLM if is_part else AutoModelForCausalLM, name, "model",
        dtype="auto" if dtype == "auto" else DTYPES[dtype], trust_remote_code=trust_remote_code,
        output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    # transformers would initialize these at random and continue.
    unloaded = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if unloaded:
        raise InputError(
            f"The weights in '{name}' do not match the {type(model).__name__} that its config.json describes: "
            f"{len(unloaded)} tensors are missing or have another shape, such as {unloaded[0]}."
        )
    if is_part:
        model = take_text_model(model, text, name, options)
    if device_map is None:
        model = model.to(device)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if torch.cuda.is_available() and device_map is not None and places & {"cpu", "disk"}:
        raise InputError(
            f"'{name}' does not fit on {torch.cuda.device_count()} GPUs, so device_map would compute some layers from "
            "the host's memory; raise resources.num_gpus."
        )
    check_head(model.eval())
    if len(places) <= 1:  # packed rows are read with tensors on one device
        enable_packing(model)
    return model


def check_saved(model: CausalLM, folder: Path) -> None:
    """Check that a saved model loads completely, by the names and shapes of its tensors; no weights are read.

    Raises:
        RunFailed: tensors are missing, have another shape, or would be ignored.
    """
    with quiet_loading():
        _, report = type(model).from_pretrained(folder, device_map="meta", output_loading_info=True)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if wrong:
        raise RunFailed(
            f"The saved {type(model).__name__} would not load: {len(wrong)} of its tensors are missing or unknown, or "
            f"have another shape, such as {min(wrong)}; please report the architecture. The checkpoints are complete."
        )


def attention_options(settings: Any, attention: str | None = None) -> dict[str, Any]:
    """Return the arguments with which transformers builds a model's attention.

    Args:
        settings: the causal LM's configuration.
        attention: the implementation that the user names; None: transformers' choice, or `eager` for a soft-cap on
            attention scores (Gemma 2), which `sdpa` ignores.

    Raises:
        InputError: the implementation ignores the soft-cap.
    """
    if getattr(settings, "attn_logit_softcapping", None) is None:
        return {} if attention is None else {"attn_implementation": attention}
    if attention == "sdpa":
        raise InputError(
            "attention is 'sdpa', which ignores this model's soft-cap on attention scores (attn_logit_softcapping); "
            "leave it out, or name 'eager' or 'flash_attention_2'."
        )
    return {"attn_implementation": attention or "eager"}


def load_head(name: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Head:
    """Load the head of a model in a local folder or with a hub id to the CPU, without loading the body.

    Raises:
        InputError: no safetensors file contains the output embedding under the name that the architecture uses.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    config = load_model_config(name, trust_remote_code=trust_remote_code)
    loader = AutoModelForMultimodalLM if is_text_part(config, causal_config(config, name)) else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    head = get_head(model)
    named = list(model.named_parameters(remove_duplicate=False))

    def read(parameter: Tensor | None) -> Tensor | None:
        # Tied weights are saved under one of their names.
        names = [key for key, candidate in named if candidate is parameter]
        return None if parameter is None else _read_tensor(name, names).to(dtype)

    weight = read(head.weight)
    assert weight is not None
    return replace(head, weight=weight, bias=read(head.bias))


def _read_tensor(model: str, names: list[str]) -> Tensor:
    """Read the tensor stored under one of `names` in the safetensors of `model`."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files: dict[str, str] = {}
    if index:
        files = json.loads(Path(index).read_text())["weight_map"]
    elif single := cached_file(model, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        with safe_open(single, "pt") as tensors:
            files = dict.fromkeys(tensors.keys(), SAFE_WEIGHTS_NAME)
    # A model that also reads images may be saved under other names than its class has: language_model.lm_head.weight.
    endings = tuple(f".{name.removeprefix('model.').removeprefix('language_model.')}" for name in names)
    found = [name for name in names if name in files] or [name for name in files if name.endswith(endings)]
    if found and (path := cached_file(model, files[found[0]], _raise_exceptions_for_missing_entries=False)):
        with safe_open(path, "pt") as tensors:
            return tensors.get_tensor(found[0])
    raise InputError(
        f"The safetensors of '{model}' contain none of {', '.join(names)}, so its head cannot be read; use "
        "support 'topk' instead of 'hidden'."
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False):
    """Load the tokenizer of a local folder or a hub id.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_model_config(name: str, *, trust_remote_code: bool = False):
    """Load the model configuration (`config.json`) of a local folder or a hub id."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, "model configuration", trust_remote_code=trust_remote_code)


def load_generation_config(name: str, *, trust_remote_code: bool = False):
    """Load the generation settings of a local folder or a hub id; without any, those that its `config.json` implies.

    Raises:
        InputError: transformers cannot read them, so that it would ignore them or refuse to load the model.
    """
    from transformers import GenerationConfig

    folder = Path(os.path.expanduser(name))
    is_offline = not folder.is_dir() and hub_problem() is not None
    try:
        return GenerationConfig.from_pretrained(str(folder) if folder.is_dir() else name, local_files_only=is_offline)
    except OSError as error:
        if not isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):  # there is no such file
            return GenerationConfig.from_model_config(load_model_config(name, trust_remote_code=trust_remote_code))
        raise InputError(f"generation_config.json of '{name}' is not JSON; correct the file or delete it.") from error
    except (ValueError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            f"generation_config.json of '{name}' is not valid; correct the file or delete it: {problem}"
        ) from error


def pick_device(device: str = "auto") -> str:
    """Return `device`; for `auto`, the first GPU that this process sees, or the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_pretrained(loader, name: str, what: str, **options):
    folder = Path(os.path.expanduser(name))
    if is_local_path(name) and not folder.is_dir():
        problem = f"'{name}' is a file, not a folder" if folder.exists() else f"The folder '{name}' does not exist"
        advice = "give a model folder or a hub id"
        if folder.suffix == ".gguf":
            advice = "GGUF files cannot be trained or served; give the folder of the original checkpoint or its hub id"
        raise InputError(f"{problem}, so no {what} can be loaded; {advice}.")
    hub = None if folder.is_dir() else hub_problem()
    try:
        with quiet_loading():
            return loader.from_pretrained(
                str(folder) if folder.is_dir() else name, **options, **({"local_files_only": True} if hub else {})
            )
    except Exception as error:  # transformers, safetensors, tokenizers and the hub each raise their own types
        raise InputError(_loading_problem(error, name, what, hub)) from error


def _loading_problem(error: Exception, name: str, what: str, hub: str | None) -> str:
    """Return a sentence on why a model, a tokenizer or a configuration could not be loaded.

    Args:
        hub: why the model hub cannot be reached, if it was needed and cannot.
    """
    if hub:
        return (
            f"No {what} could be loaded from '{name}': there is no such folder, {hub}, and no download of it is in the "
            "local cache; check the name and the connection, or give a local folder."
        )
    text = str(error) or type(error).__name__
    if "trust_remote_code" in text:
        return (
            f"'{name}' comes with Python code of its own, which is needed to load its {what}; read the code, then set "
            "trust_remote_code: true at the student or teacher to run it."
        )
    hint = (
        ""
        if Path(os.path.expanduser(name)).is_dir()
        else " (there is no such folder, so the name was used as a hub id)"
    )
    return f"No {what} could be loaded from '{name}'{hint}: {textwrap.shorten(text, 300, placeholder=' …')}"


def max_positions(config: Any) -> int:
    """Return the longest sequence that the model of a transformers config accepts; `UNLIMITED` if the config has no
    limit."""
    return int(getattr(config and config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress transformers' progress bars and load reports; `load_model` itself raises for missing weights."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
