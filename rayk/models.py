"""Causal language models as rayk uses them: loading, the body that makes hidden states, and the `Head` that reads them.

Body and head are kept apart because the head is the dear part of a small model with a large vocabulary: it is applied
only where a token counts, and only a chunk of positions at a time.
"""

import hashlib
import json
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from rayk.errors import InputError
from rayk.packing import enable_packing, packed_hidden, packs

CausalLM = Any
"""A transformers causal language model (transformers' classes carry no types to check against)."""

_HASHED_WHOLE_BYTES = 64 << 20
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 256

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Head:
    """The map from final hidden states to logits: cap·tanh((scale·(W h + b))/cap), each part optional.

    Attributes:
        weight: [vocab, width].
        bias: [vocab] or None.
        scale: multiplies the logits (Granite, Cohere, Falcon-H1); 1 elsewhere.
        softcap: Gemma's cap on logits; None elsewhere.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device | str) -> "Head":
        """The same head on `device`."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def of(self, ids: Tensor) -> "Head":
        """The head of the tokens `ids` alone, in their order."""
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def first(self, tokens: int) -> "Head":
        """The head of the first `tokens` tokens alone, sharing memory."""
        return replace(self, weight=self.weight[:tokens], bias=None if self.bias is None else self.bias[:tokens])

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [tokens, vocab] of hidden states [tokens, width]; the product runs in `hidden`'s dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def pack_head(head: Head) -> dict[str, Any]:
    """`head` as plain values and byte arrays, which Ray shares between processes without copying."""
    tensors = {"weight": head.weight, "bias": head.bias}
    packed = {
        name: None if tensor is None else tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        for name, tensor in tensors.items()
    }
    return packed | {"dtype": str(head.weight.dtype), "scale": head.scale, "softcap": head.softcap}


def unpack_head(packed: dict[str, Any]) -> Head:
    """What `pack_head` made; the tensors share the arrays' memory and must not be written to."""
    dtype = next(each for each in DTYPES.values() if str(each) == packed["dtype"])

    def tensor(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the array is read-only
            return torch.from_numpy(array).view(dtype)

    weight = tensor(packed["weight"])
    assert weight is not None
    return Head(weight, tensor(packed["bias"]), packed["scale"], packed["softcap"])


def head_of(model: CausalLM) -> Head:
    """The head of a transformers causal LM, sharing its parameters.

    Raises:
        InputError: the model has no output embedding.
    """
    projection = model.get_output_embeddings()
    if projection is None or not hasattr(projection, "weight"):
        raise InputError(f"{type(model).__name__} has no output embedding; rayk needs a causal language model.")
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling  # Granite
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if isinstance(getattr(config, name, None), float | int):
            scale *= getattr(config, name)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(projection.weight, getattr(projection, "bias", None), scale, softcap)


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
    head = head_of(model)
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


def final_hidden(model: CausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the final norm, [rows, length, width], of right-padded rows."""
    body = getattr(model, model.base_model_prefix)
    if packs(model, input_ids.shape[1]) and not attention_mask.all():
        return packed_hidden(body, input_ids, attention_mask)
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: CausalLM) -> None:
    """Compare body + `Head` with the model's own logits on a short probe.

    Raises:
        InputError: they differ, so this architecture does something between body and logits that `Head` does not know;
            or they are not numbers.
    """
    vocab_size = head_of(model).vocab_size
    probe = torch.arange(1, 9, device=model.device)[None] % vocab_size
    mask = torch.ones_like(probe)
    own = model(input_ids=probe, attention_mask=mask, use_cache=False).logits[0].float()
    ours = head_of(model).logits(final_hidden(model, probe, mask)[0])
    if own.isnan().any():
        raise InputError(f"{type(model).__name__} computes NaN from its weights; the checkpoint is damaged.")
    # Against the logits' own spread: a missing scale shows on flat distributions too, and rounding looks like none.
    own, ours = own - own.mean(1, keepdim=True), ours - ours.mean(1, keepdim=True)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if (own - ours).abs().max() > tolerance * own.abs().max():
        raise InputError(
            f"{type(model).__name__} computes its logits in a way rayk's Head does not describe (they differ by up to "
            f"{(own - ours).abs().max():.3g}); please report the architecture, since training on these would be wrong."
        )


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


def weights_fingerprint(name: str, commit: str | None = None) -> str:
    """A hash that changes when the weights of a local folder do; of a hub id its `commit`, or "" where that is not
    known.

    Small files are hashed whole. Of larger ones the header and some of each tensor is, so that the first replica is not
    held up by reading tens of gigabytes twice: training any tensor changes the fingerprint, but an edit by hand of a
    few of its elements may not.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return commit or ""
    whole = hashlib.blake2b(digest_size=16)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        whole.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for offset, length in _sampled(file, path):
                file.seek(offset)
                whole.update(file.read(length))
    return whole.hexdigest()


def _sampled(file: BinaryIO, path: Path) -> list[tuple[int, int]]:
    """Which (offset, length) of a file its fingerprint reads."""
    size = path.stat().st_size
    if size <= _HASHED_WHOLE_BYTES:
        return [(0, size)]
    if path.suffix != ".safetensors":
        return [(i * (size - _SAMPLE_BYTES) // _SAMPLES, _SAMPLE_BYTES) for i in range(_SAMPLES + 1)]
    header = 8 + int.from_bytes(file.read(8), "little")
    tensors = json.loads(file.read(header - 8))
    tensors.pop("__metadata__", None)
    samples = [(0, header)]
    for start, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
        length = min(_SAMPLE_BYTES, end - start)
        samples += [(header + start + i * (end - start - length) // 2, length) for i in range(3)]
    return samples


def real_vocab_size(tokenizer) -> int:
    """One more than the tokenizer's highest id. Models often pad their embeddings past it."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of the token-to-id map: equal for tokenizers that give every token the same id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


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
