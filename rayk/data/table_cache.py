"""Keep tokenized rows between starts, so that a resumed run, or a run after `rayk doctor`, does not tokenize again.

Tables lie in the folder `tokens` of `rayk.config.paths.cache_folder`. The name of a table is a hash of the files'
contents, the tokenizer, the chat template and the settings, so that a change of any of them makes a new table. Sources
on the hub and small ones are tokenized each time.
"""

import datetime
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

import rayk
from rayk.config import DataConfig, DataSource
from rayk.config.paths import cache_folder
from rayk.data.chat_template import ChatTemplate
from rayk.data.chunks import cut_into_chunks
from rayk.data.examples import ExampleTable
from rayk.data.sources import local_files, read_rows
from rayk.data.tokenizing import RowTokenizer, report_rows
from rayk.data.tokenizing_process import RowCounts, choose_processes, tokenize_in_processes
from rayk.storage.atomic import replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SMALL_BYTES = 4 << 20
"""Sources below this size are tokenized faster than anyone notices."""
_MOST_BYTES = 20 << 30
"""Size of all kept tables above which the least recently used ones are deleted."""
_COUNTS = b"rayk.counts"


def tokenize_once(
    source: DataSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, prompts_only: bool = False,
    pairs: bool = False,
) -> ExampleTable:  # fmt: skip
    """Return the rows of a source as `tokenize` does, from a kept table if there is one; large sources are tokenized in
    several processes.

    Raises:
        InputError: as `tokenize`.
    """
    arguments = {"source": source, "data": data, "tokenizer": tokenizer, "prompts_only": prompts_only, "pairs": pairs}
    section = "data.evaluation." if source is data.evaluation else "data.train."
    arguments["section"] = section
    files = local_files(source)
    size = sum(file.stat().st_size for file in files)
    if size < _SMALL_BYTES or not getattr(tokenizer, "is_fast", False):
        return cut_into_chunks(_tokenize(arguments, 1), source, section)
    path = cache_folder() / "tokens" / f"{_key(files, arguments)}.arrow"
    if (table := _load(path)) is not None:
        report_rows(source.path, len(table), RowCounts(**json.loads(table.table.schema.metadata[_COUNTS])))
    else:
        table = _tokenize(arguments, choose_processes(files))
        _store(path, table.table)
    return cut_into_chunks(table, source, section)


def _tokenize(arguments: dict[str, Any], processes: int) -> ExampleTable:
    name = arguments["source"].path
    if processes == 1:
        rows = RowTokenizer(**arguments)
        table = ExampleTable.from_examples(rows.examples(read_rows(arguments["source"])), rows.skipped, rows.ends)
        counts = RowCounts(dict(rows.skipped), rows.first_skipped, rows.divided_rows, sorted(rows.ends))
    else:
        columns, counts = tokenize_in_processes(arguments, processes)
        table = ExampleTable.from_table(columns, counts.skipped, counts.ends)
    report_rows(name, len(table), counts)
    metadata = table.table.schema.metadata | {_COUNTS: json.dumps(vars(counts))}
    return ExampleTable(table.table.replace_schema_metadata(metadata))


def _key(files: list[Path], arguments: dict[str, Any]) -> str:
    """Return a hash of everything on which the table depends."""
    data, tokenizer = arguments["data"], arguments["tokenizer"]
    template = ChatTemplate.from_settings(data, tokenizer)
    settings = {
        "version": rayk.__version__,
        "source": arguments["source"].model_dump(mode="json"),
        "data": data.model_dump(mode="json", exclude={"train", "evaluation"}),
        "today": None if data.chat_template_date else str(datetime.date.today()),
        "files": [str(file) for file in files],  # rows name their file
        "kind": [arguments["prompts_only"], arguments["pairs"]],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": [tokenizer.special_tokens_map, type(tokenizer).__name__],
        "template": [template.template, tokenizer.chat_template],
    }
    digest = hashlib.blake2b(json.dumps(settings, default=str, sort_keys=True).encode(), digest_size=16)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _load(path: Path) -> ExampleTable | None:
    """Return a kept table, mapped into memory; None if there is none or it is damaged."""
    try:
        with pa.memory_map(str(path)) as file:
            table = ExampleTable(pa.ipc.open_file(file).read_all())
        os.utime(path)  # the time of its last use
    except (OSError, pa.ArrowInvalid):
        return None
    return table if _COUNTS in (table.table.schema.metadata or {}) else None


def _store(path: Path, table: pa.Table) -> None:
    """Keep a table; without space or permission it is not kept, which only costs time at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replace_file(path, f".{os.getpid()}") as unfinished,
            pa.OSFile(str(unfinished), "wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)
        _delete_oldest(path.parent)
    except OSError as error:
        logger.info("The tokenized rows are not kept: %s", error)


def _delete_oldest(folder: Path) -> None:
    kept = sorted(folder.glob("*.arrow"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in kept:
        total += file.stat().st_size
        if total > _MOST_BYTES:
            file.unlink(missing_ok=True)
