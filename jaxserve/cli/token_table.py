"""A Parquet file of scored tokens, written as they come."""

from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.score import ScoreOutput
from jaxserve.tokenizer import Tokenizer

GROUP_ROWS = 65536
"""Rows of a row group: what is in memory at once."""


class TokenTable:
    """One row for each token: line (of the input), continuation (its index in the row), position (in the whole
    sequence, BOS included), token_id, token (text), logprob. Raises ConfigError where there is no pyarrow, OSError.
    """

    def __init__(self, path: Path):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError("--logprobs writes Parquet with pyarrow: pip install 'jaxserve[offline]'") from error
        self._pyarrow = pyarrow
        types = {
            "line": pyarrow.int64(),
            "continuation": pyarrow.int32(),
            "position": pyarrow.int32(),
            "token_id": pyarrow.int32(),
            "token": pyarrow.string(),
            "logprob": pyarrow.float32(),
        }
        self._schema = pyarrow.schema(list(types.items()))
        self._columns: dict[str, list[Any]] = {name: [] for name in types}
        self._file = path.open("wb")
        self._writer = parquet.ParquetWriter(self._file, self._schema)

    def add(self, line: int, continuation: int, output: ScoreOutput, tokenizer: Tokenizer) -> None:
        count, columns = len(output.token_ids), self._columns
        columns["line"] += [line] * count
        columns["continuation"] += [continuation] * count
        columns["position"] += range(output.context_tokens, output.context_tokens + count)
        columns["token_id"] += output.token_ids
        columns["token"] += map(tokenizer.token_str, output.token_ids)
        columns["logprob"] += output.token_logprobs
        if len(columns["line"]) >= GROUP_ROWS:
            self._flush()

    def __enter__(self) -> "TokenTable":
        return self

    def __exit__(self, *exc: object) -> None:
        """Ends the file: what was added is in it, also when not all rows came."""
        if self._columns["line"]:
            self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        self._writer.write_table(self._pyarrow.table(self._columns, schema=self._schema))
        for column in self._columns.values():
            column.clear()
