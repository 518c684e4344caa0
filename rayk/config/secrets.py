"""Secrets in settings: passwords in URIs, and keys and tokens among options that rayk passes on. They are masked in
everything that rayk writes or prints: `config.yaml`, provenance, reports, logs and errors.

A secret is recognized by the name of its setting (`hf_token`, `api_key`, `password`, …) or by its place in a URI (user
and password, `?secret_key=…`). Texts that other libraries write, such as errors, are searched for the secrets of all
settings that this process has read, also as base64.
"""

import base64
import re
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

MASK = "***"
"""The text that replaces a secret."""

_SHORTEST = 6
"""Shorter secrets are not searched for in texts, where they would hide parts of other words."""
_DEEPEST = 30
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {
    "secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "authorization",
    "signature", "sig",
}  # fmt: skip
_KEY_KINDS = {"access", "account", "api", "auth", "client", "encryption", "master", "private", "service", "signing"}
_SPECIAL_TOKENS = {"bos", "eos", "pad", "unk", "mask", "sep", "cls", "stop", "end", "image", "special", "mark"}
_HARMLESS_ENDS = {"variable", "name", "file", "path", "env"}
_USER_INFO = re.compile(r"""(?<=://)(?:[^/@\s'"?#]*|[^/@\s'":?#]+:(?!\d+/)[^@\s'"]*)@""")
"""The user and password of a URI; an unescaped '/' in a password does not end it."""
_QUERY_VALUE = re.compile(r"""([?&])([\w.-]+)=([^&#\s'"]*)""")
_NAMED_VALUE = re.compile(r"""([\w.-]+)(["']?\s*[:=]\s*["']?)([^\s"',{}\[\]]+)""")
"""A name and its value in the text of settings, such as `hf_token: abc` or `{"api_key": "abc"}`."""
_remembered: dict[str, None] = {}


def hide(text: str) -> str:
    """Return a text without the user and password of its URIs, and without the secrets that are known."""
    text = _hide_in_uris(text)
    for secret in sorted(_remembered, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def hide_named(text: str) -> str:
    """Return a text that may be settings without what `hide` removes, and without values after the names of secrets."""
    return _NAMED_VALUE.sub(
        lambda found: f"{found[1]}{found[2]}{MASK if _is_secret(found[1], found[3]) else found[3]}", hide(text)
    )


def redact(values: Any, depth: int = 0) -> Any:
    """Return a copy of plain settings with `MASK` for each secret, and for what is nested too deeply."""
    if depth > _DEEPEST:
        return MASK
    if isinstance(values, dict):
        return {key: MASK if _is_secret(key, value) else redact(value, depth + 1) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redact(value, depth + 1) for value in values]
    return _hide_in_uris(values) if isinstance(values, str) else values


def remember_secrets(values: Any) -> None:
    """Let `hide` find the secrets in these plain settings."""
    for secret in _find(values):
        remember_secret(secret)


def remember_secret(secret: str) -> None:
    """Let `hide` find this secret, also as base64 and also inside of a longer text in base64."""
    if len(secret) < _SHORTEST or secret == MASK:
        return
    _remembered[secret] = None
    for skipped in range(3):  # the bits of a letter depend on the number of bytes before it
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * skipped + secret.encode()).decode()
            _remembered[text[(0, 2, 3)[skipped] :].rstrip("=")[:-1]] = None


def masked_places(values: Any, place: str = "") -> list[str]:
    """Return the places ("a.0.b") of secrets that are `MASK`, because they come from a stored config."""
    if not isinstance(values, dict | list):
        return [place] if values == MASK and _has_secret_name(place.rpartition(".")[2]) else []
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return [found for key, value in items for found in masked_places(value, f"{place}.{key}".lstrip("."))]


def without_masks(uri: str) -> str:
    """Return a URI from a stored config without the masks in it, so that the environment gives the credentials."""
    head, _, query = uri.partition("?")
    kept = [pair for pair in query.split("&") if pair and not pair.endswith(f"={MASK}")]
    return head.replace(f"://{MASK}@", "://", 1) + (f"?{'&'.join(kept)}" if kept else "")


def _is_secret(name: Any, value: Any) -> bool:
    if not _has_secret_name(str(name)) or value is None or isinstance(value, bool) or value in ("", [], {}):
        return False
    # Numbers and short texts are other kinds of tokens.
    return _words(name)[-1:] != ["token"] or (isinstance(value, str) and len(value) >= _SHORTEST)


def _has_secret_name(name: str) -> bool:
    words = _words(name)
    if not words or words[-1] in _HARMLESS_ENDS:
        return False
    if words[-1] == "token" and not _SPECIAL_TOKENS & set(words):
        return True
    pairs = pairwise(words)
    return bool(_SECRET_WORDS & set(words)) or any(kind in _KEY_KINDS and key == "key" for kind, key in pairs)


def _words(name: Any) -> list[str]:
    return [word.lower() for word in _WORDS.findall(str(name))]


def _hide_in_uris(text: str) -> str:
    text = _USER_INFO.sub(f"{MASK}@", text)
    return _QUERY_VALUE.sub(lambda found: _masked_pair(*found.groups()), text)


def _masked_pair(mark: str, name: str, value: str) -> str:
    return f"{mark}{name}={MASK if _has_secret_name(name) else value}"


def _find(values: Any, depth: int = 0, *, is_secret: bool = False) -> list[str]:
    """Return the secrets in plain settings; with `is_secret` all texts and numbers in them."""
    if isinstance(values, dict | list | tuple):
        if depth > _DEEPEST:  # YAML may contain itself
            return []
        items = values.items() if isinstance(values, dict) else ((None, value) for value in values)
        return [
            found
            for key, value in items
            for found in _find(value, depth + 1, is_secret=is_secret or _is_secret(key, value))
        ]
    if is_secret:
        return [] if values is None or isinstance(values, bool) else [str(values)]
    return _secrets_of_uri(values) if isinstance(values, str) and "://" in values else []


def _secrets_of_uri(uri: str) -> list[str]:
    found = []
    if user_info := _USER_INFO.search(uri):
        password = user_info[0].removesuffix("@").partition(":")[2]
        found += [password, unquote(password)]
    found += [value for _, name, value in _QUERY_VALUE.findall(uri) if _has_secret_name(name)]
    return found
