"""Environment variables that must be set before torch is loaded."""

import os

# Waiting OpenMP threads that spin take the cores from whoever has work: teachers and students on one machine ran 1.4
# to 1.5 times faster with passive waiting (PLATFORM §5), and a busy laptop far more than that.
THREADING = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_threading() -> None:
    """Set what is not set yet, for this process and those it starts."""
    for name, value in THREADING.items():
        os.environ.setdefault(name, value)
