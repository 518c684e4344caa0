"""Storage of teachers' signals on disk."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import Placement, Settings, StoragePath


class CacheConfig(Settings):
    """Storage of the teachers' signals on disk, from which later epochs and other runs read them."""

    path: Annotated[str, StoragePath(), Placement()]
    """A folder or URI (s3://…, gs://…) that all workers can reach. Several runs may share it."""
    max_gigabytes: Annotated[float | None, Placement()] = Field(default=None, gt=0)
    """Largest size in gigabytes; above it the least recently used signals are deleted. `null`: no limit."""
