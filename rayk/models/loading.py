"""Load causal language models, tokenizers and model configurations from a local folder or a hub id."""

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayk.config.paths import is_local_path
from rayk.errors import InputError
from rayk.models.head import Head, check_head, get_head
from rayk.models.hub import hub_problem
from rayk.models.packing import enable_packing
from rayk.models.types import DTYPES, CausalLM

UNLIMITED = 1 << 30
"""Length limit of a model whose configuration has none."""


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> CausalLM:
    """Load a causal LM from a local folder or a hub id to `device`, and check its head.

    Raises:
        InputError: the folder or id contains no causal language model, or not all of its weights.
    """
    from transformers import AutoModelForCausalLM

    model, report = _from_pretrained(
        AutoModelForCausalLM, name, "model", dtype="auto" if dtype == "auto" else DTYPES[dtype],
        trust_remote_code=trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    # transformers would initialize these at random and continue.
    unloaded = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if unloaded:
        raise InputError(
            f"The weights in '{name}' do not match the {type(model).__name__} that its config.json describes: "
            f"{len(unloaded)} tensors are missing or have another shape, such as {unloaded[0]}."
        )
    model = model.to(device)
    check_head(model.eval())
    enable_packing(model)
    return model


def load_head(name: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Head:
    """Load the head of a model in a local folder or with a hub id to the CPU, without loading the body.

    Raises:
        InputError: no safetensors file contains the output embedding under the name that the architecture uses.
    """
    from transformers import AutoModelForCausalLM

    config = load_model_config(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
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
    files = json.loads(Path(index).read_text())["weight_map"] if index else dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    for name in names:
        path = cached_file(model, files[name], _raise_exceptions_for_missing_entries=False) if name in files else None
        if path is None:
            continue
        with safe_open(path, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (not a dict)
                return tensors.get_tensor(name)
    raise InputError(
        f"The safetensors of '{model}' contain none of {', '.join(names)}, so its head cannot be read; leave "
        "'engine.hidden' out."
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
    """Load the generation settings of a local folder or a hub id; without any, those that its `config.json` implies."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(name, trust_remote_code=trust_remote_code))


def pick_device(device: str = "auto") -> str:
    """Return `device`; for `auto`, the first GPU that this process sees, or the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_pretrained(loader, name: str, what: str, **options):
    folder = Path(name).expanduser()
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
    hint = "" if Path(name).expanduser().is_dir() else " (there is no such folder, so the name was used as a hub id)"
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
