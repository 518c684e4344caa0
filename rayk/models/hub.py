"""Whether the model hub can be reached, found out once and quickly."""

import os
import socket
import urllib.request
from functools import lru_cache
from urllib.parse import urlsplit

_SECONDS = 5.0


@lru_cache(maxsize=1)
def hub_problem() -> str | None:
    """Return why the model hub cannot be reached; None if it can, or if only huggingface_hub can tell.

    huggingface_hub repeats each request for 25 seconds, and loading a model makes several. Without a connection, files
    that were downloaded before are all that there is.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    is_offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1"
    if is_offline or not address.hostname or address.scheme in urllib.request.getproxies():
        return None
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=_SECONDS).close()
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached ({error.strerror or error})"
    return None
