"""Parquet and Arrow files, a part at a time: prompts out of their columns, answers into new ones beside the others."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from jaxserve.batch_job.files import EXTRA, Source, kind_of, open_read
from jaxserve.batch_job.records import Record
from jaxserve.errors import ConfigError

PART_ROWS = 2048
RESULTS = ("answer", "finish_reason", "prompt_tokens", "completion_tokens", "response", "error")
"""The columns of the output: the first choice's text, why it ended, usage; the whole body as JSON; what went wrong."""


def check_installed() -> None:
    """Raises ConfigError, with the cure, where there is no pyarrow."""
    _pyarrow()


def check_tables(sources: Sequence[Source], column: str | None, output: str) -> int:
    """How many rows there are. Raises ConfigError for columns that are not there, not prompts, or in the way."""
    total, first = 0, None
    for source in sources:
        with _opened(source) as table:
            total += table.rows
            chosen = _column(table, column)
            if first is None:
                first = table.schema
            elif not table.schema.equals(first):
                raise ConfigError(f"{source.path} has other columns than {sources[0].path}; run a job for each kind")
            taken = sorted(set(RESULTS) & set(table.schema.names))
            if taken and kind_of(output) != "jsonl":
                raise ConfigError(
                    f"{source.path} has a column {taken[0]!r}, a name of the output's: rename it, or write .jsonl"
                )
            _check_type(source, table.schema.field(chosen))
    return total


def count_table(source: Source) -> int:
    """How many rows a table has."""
    with _opened(source) as table:
        return table.rows


def read_table(source: Source, column: str | None) -> Iterator[tuple[str | None, Any]]:
    """(custom_id, prompt or messages or None) of each row; custom_id if there is a column of texts of that name."""
    pa = _pyarrow()
    with _opened(source) as table:
        chosen = _column(table, column)
        named = "custom_id" in table.schema.names and pa.types.is_string(table.schema.field("custom_id").type)
        wanted = [chosen, "custom_id"] if named and chosen != "custom_id" else [chosen]
        for part in table.parts(wanted):
            prompts = part.column(chosen).to_pylist()
            ids = part.column("custom_id").to_pylist() if named else [None] * len(prompts)
            for custom_id, prompt in zip(ids, prompts, strict=True):
                if isinstance(prompt, list):  # where a message lacks a field, Arrow has null
                    prompt = [{k: v for k, v in (m or {}).items() if v is not None} for m in prompt]
                yield custom_id, prompt


def write_table(records: IO[bytes], sources: Sequence[Source], path: Path) -> None:
    """A table of all records, one a line, beside the columns of the tables that they answer.

    What is at `path` is replaced by the whole new table, or, if anything goes wrong, left as it is. Raises OSError.
    """
    pa = _pyarrow()
    asked = [s for s in sources if kind_of(s.path) in ("parquet", "arrow")]
    if asked:
        with _opened(asked[0]) as table:
            schema = table.schema.remove_metadata()
    else:
        schema = pa.schema([("custom_id", pa.string())])
    for field in _result_schema():
        schema = schema.append(field)
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        with _writer(file, path, schema) as writer:
            for inputs, found in _parts(records, asked):
                columns = [inputs.column(name) for name in inputs.column_names]
                columns += [
                    pa.array(values, field.type) for field, values in zip(_result_schema(), _values(found), strict=True)
                ]
                writer.write_table(pa.table(columns, schema=schema))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _parts(records: IO[bytes], asked: Sequence[Source]) -> Iterator[tuple[Any, list[Record]]]:
    """Rows of the input as a table, and their records."""
    pa = _pyarrow()
    decode = msgspec.json.Decoder(Record).decode
    for source in asked:
        with _opened(source) as table:
            for part in table.parts(None):
                yield part, [decode(records.readline()) for _ in range(part.num_rows)]
    while found := [decode(line) for line in itertools.islice(records, PART_ROWS)]:
        yield pa.table({"custom_id": pa.array([r.custom_id for r in found], pa.string())}), found


def _result_schema() -> list[Any]:
    pa = _pyarrow()
    texts, counts = ("answer", "finish_reason"), ("prompt_tokens", "completion_tokens")
    kinds = dict.fromkeys(texts, pa.string()) | dict.fromkeys(counts, pa.int64())
    return [pa.field(name, kinds.get(name, pa.string())) for name in RESULTS]


def _values(found: Sequence[Record]) -> list[list[Any]]:
    """The values of RESULTS' columns."""
    rows = []
    for record in found:
        body = bytes(record.response.body) if record.response is not None else b"{}"
        answer = msgspec.json.decode(body, type=_Answer)
        choice = answer.choices[0] if answer.choices else _Choice()
        text = choice.message.content if choice.message is not None else choice.text
        usage = answer.usage or _Usage()
        error = record.error.message if record.error is not None else None
        whole = body.decode() if record.response is not None else None
        rows.append((text, choice.finish_reason, usage.prompt_tokens, usage.completion_tokens, whole, error))
    return [list(column) for column in zip(*rows, strict=True)]


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    """What of a response has a column of its own."""

    choices: list[_Choice] = []
    usage: _Usage | None = None


class _Table:
    """An open file of columns."""

    def __init__(self, file: IO[bytes], arrow: bool):
        pa = _pyarrow()
        self._arrow = arrow
        if arrow:
            self._file = pa.ipc.open_file(file)
            self.schema = self._file.schema
            self.rows = sum(self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches))
        else:
            self._file = pa.parquet.ParquetFile(file)
            self.schema, self.rows = self._file.schema_arrow, self._file.metadata.num_rows

    def parts(self, columns: list[str] | None) -> Iterator[Any]:
        """The rows in order, as tables of at most PART_ROWS."""
        pa = _pyarrow()
        if not self._arrow:
            for batch in self._file.iter_batches(PART_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])
            return
        for i in range(self._file.num_record_batches):
            table = pa.Table.from_batches([self._file.get_batch(i)])
            table = table if columns is None else table.select(columns)
            for start in range(0, table.num_rows, PART_ROWS):
                yield table.slice(start, PART_ROWS)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[_Table]:
    pa = _pyarrow()
    with open_read(source.path) as file:
        try:
            table = _Table(file, kind_of(source.path) == "arrow")
        except pa.ArrowException as error:
            raise ConfigError(f"{source.path} is no {kind_of(source.path)} file: {error}") from error
        try:
            yield table
        except pa.ArrowException as error:
            raise ConfigError(f"{source.path} is broken: {error}") from error


def _writer(file: IO[bytes], path: Path, schema: Any) -> Any:
    pa = _pyarrow()
    return pa.ipc.new_file(file, schema) if kind_of(path.name) == "arrow" else pa.parquet.ParquetWriter(file, schema)


def _column(table: _Table, column: str | None) -> str:
    """The column of prompts: the one asked for, else `messages`, else `prompt`."""
    names = table.schema.names
    for name in ("messages", "prompt") if column is None else (column,):
        if names.count(name) == 1:
            return name
    raise ConfigError(
        f"no column {column or 'messages or prompt'!r}; the columns are {', '.join(names)}: name one with --column"
    )


def _check_type(source: Source, field: Any) -> None:
    types = _pyarrow().types
    if not (types.is_string(field.type) or types.is_large_string(field.type) or _is_list(field.type)):
        raise ConfigError(
            f"{source.path}: column {field.name!r} holds {field.type}, but prompts are texts or lists of messages; "
            "name another with --column"
        )


def _is_list(kind: Any) -> bool:
    types = _pyarrow().types
    return bool(types.is_list(kind) or types.is_large_list(kind)) and bool(types.is_struct(kind.value_type))


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"Parquet and Arrow files need pyarrow: {EXTRA}") from None
    return pyarrow
