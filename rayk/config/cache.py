"""Where teachers' signals are kept."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import Settings


class CacheConfig(Settings):
    """Signals kept on disk, so that later epochs and other runs do not ask for them again."""

    path: str
    """A folder or a URI (s3://…, gs://…) that all workers reach; several runs may share it."""
    max_gigabytes: Annotated[float, Field(gt=0)] | None = None
    """Beyond it the least recently used signals are deleted; by default nothing is."""
