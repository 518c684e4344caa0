"""Record metrics in `metrics.jsonl` and TensorBoard, on rank 0."""

import json
from pathlib import Path
from typing import Any

from rayk.config import TrackingConfig
from rayk.report.run_directory import read_lines
from rayk.storage.atomic import write_whole


class Recorder:
    """Append one row per step. When opened at step n, remove the rows of later steps, so that after a resume every step
    has exactly one row."""

    def __init__(self, folder: Path, step: int, tracking: TrackingConfig):
        self._path = folder / "metrics.jsonl"
        self._rewrite([line for line in read_lines(self._path) if line["step"] <= step])
        self._writer = None
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._write_scalars(row, row["step"])

    def add_to_last(self, values: dict[str, Any]) -> None:
        """Add values to the last row."""
        *earlier, last = read_lines(self._path)
        self._file.close()
        self._rewrite([*earlier, last | values])
        self._write_scalars(values, last["step"])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def _write_scalars(self, values: dict[str, Any], step: int) -> None:
        if self._writer:
            for name, value in values.items():
                if name != "step" and not name.endswith("_at"):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()
