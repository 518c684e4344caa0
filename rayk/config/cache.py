"""Storage of teachers' signals on disk."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import Placement, Settings, StoragePath


class CacheConfig(Settings):
    """Teachers' signals stored on disk, so that later epochs and other runs need not request them again."""

    path: Annotated[str, StoragePath(), Placement()]
    """A folder or URI (s3://…, gs://…) that all workers can reach. Several runs may share it."""
    max_gigabytes: Annotated[float | None, Placement()] = Field(default=None, gt=0)
    """Size in gigabytes above which the least recently used signals are deleted; `null`: nothing is deleted."""
