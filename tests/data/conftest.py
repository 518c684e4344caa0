import pytest

from rayk.config import DataConfig, DataSource
from rayk.data.sources import Row
from rayk.data.tokenizing import RowTokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return tiny_tokenizer(bos=True)


@pytest.fixture(scope="session")
def encode():
    """Examples of dicts: encode(tokenizer, rows, **settings of the data or the source)."""

    def run(tokenizer, rows, *, prompts_only=False, **settings):
        shared = {name: settings.pop(name) for name in list(settings) if name in DataConfig.model_fields}
        source = DataSource(path="rows.jsonl", **settings)
        reader = RowTokenizer(source, DataConfig(train=source, **shared), tokenizer, prompts_only=prompts_only)
        lines = [Row(fields, f"rows.jsonl, line {i}") for i, fields in enumerate(rows, start=1)]
        examples = list(reader.examples(lines))
        run.skipped, run.reader, run.lines = dict(reader.skipped), reader, lines
        return examples

    return run
