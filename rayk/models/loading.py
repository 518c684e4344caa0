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

from rayk.errors import InputError
from rayk.models.head import Head, check_head, get_head
from rayk.models.packing import enable_packing
from rayk.models.types import DTYPES, CausalLM

UNLIMITED = 1 << 30


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> CausalLM:
    """A causal LM from a local folder or a hub id, on `device`, its head checked.

    Raises:
        InputError: the folder or id holds no causal language model that can be loaded whole.
    """
    from transformers import AutoModelForCausalLM

    model, report = _from_pretrained(
        AutoModelForCausalLM, name, "model", dtype="auto" if dtype == "auto" else DTYPES[dtype],
        trust_remote_code=trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    # transformers would leave these at random values and go on.
    unloaded = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if unloaded:
        raise InputError(
            f"The weights in '{name}' do not make the {type(model).__name__} its config.json describes: "
            f"{len(unloaded)} tensors are missing or of another shape, such as {unloaded[0]}."
        )
    model = model.to(device)
    check_head(model.eval())
    enable_packing(model)
    return model


def load_head(name: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Head:
    """The head of a local folder's or hub id's model, on the CPU, without loading the body.

    Raises:
        InputError: there are no safetensors that hold an output embedding under the name its architecture gives.
    """
    from transformers import AutoModelForCausalLM

    config = load_model_config(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    head = get_head(model)
    named = list(model.named_parameters(remove_duplicate=False))

    def read(parameter: Tensor | None) -> Tensor | None:
        # A tied head is saved under one of its names.
        names = [key for key, each in named if each is parameter]
        return None if parameter is None else _read_tensor(name, names).to(dtype)

    weight = read(head.weight)
    assert weight is not None
    return replace(head, weight=weight, bias=read(head.bias))


def _read_tensor(model: str, names: list[str]) -> Tensor:
    """The tensor that `model`'s safetensors hold under one of `names`."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = json.loads(Path(index).read_text())["weight_map"] if index else dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    for name in names:
        path = cached_file(model, files[name], _raise_exceptions_for_missing_entries=False) if name in files else None
        if path is None:
            continue
        with safe_open(path, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                return tensors.get_tensor(name)
    raise InputError(
        f"The safetensors of '{model}' hold none of {', '.join(names)}, so its head cannot be read; leave "
        "'engine.hidden' out."
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False):
    """The tokenizer of a local folder or a hub id.

    Raises:
        InputError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_model_config(name: str, *, trust_remote_code: bool = False):
    """The architecture settings (`config.json`) of a local folder or a hub id."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, "model configuration", trust_remote_code=trust_remote_code)


def pick_device(device: str = "auto") -> str:
    """`auto` is the first GPU this process sees, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_pretrained(loader, name: str, what: str, **options):
    folder = Path(name).expanduser()
    if _looks_like_path(name) and not folder.is_dir():
        raise InputError(
            f"The folder '{name}' does not exist, so no {what} can be loaded; give a model folder or a hub id."
        )
    try:
        with quiet_loading():
            return loader.from_pretrained(str(folder) if folder.is_dir() else name, **options)
    except Exception as error:  # of any type: transformers, safetensors, tokenizers and the hub each have their own
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
        taken = "" if folder.is_dir() else " (there is no such folder, so it was taken for a hub id)"
        raise InputError(f"No {what} could be loaded from '{name}'{taken}: {reason}") from error


def max_positions(config: Any) -> int:
    """Number of tokens that the model of a transformers config accepts, `UNLIMITED` where the config gives none."""
    return int(getattr(config and config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars and load reports; what matters of those, `load_model` says itself."""
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


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).is_dir()
