"""Rows of the input, one after another: which request each is, or what is wrong with it. Nothing is remembered."""

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import IO, Any

import msgspec

from jaxserve.batch_job.files import Source, explained, kind_of, open_read
from jaxserve.config import ServerOptions
from jaxserve.errors import BatchStopped, BodyTooLarge, InvalidParameter, JaxserveError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS, SCORE = "/v1/embeddings", "/v1/score"
MAX_LINE_BYTES = ServerOptions.max_body_bytes


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `number` counts the job's rows from 0, `line` the file's lines (or rows) from 1."""

    number: int
    line: int
    place: str
    custom_id: str | None = None
    url: str = ""
    body: bytes = b""
    error: JaxserveError | None = None


class _Line(msgspec.Struct):
    """A line of OpenAI's batch format."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


_line_decoder = msgspec.json.Decoder(_Line)


def read_rows(sources: list[Source], *, bare: str, column: str | None = None) -> Iterator[Row]:
    """All rows in the order of the files. Blank lines are passed over; what cannot be read is a Row with an error.

    bare: the url that a bare prompt goes to: CHAT, where it is a user's message, COMPLETIONS or EMBEDDINGS. column: see
    tables.py.
    """
    number = 0
    for source in sources:
        prefix = f"{source.label} " if len(sources) > 1 else ""
        kind = kind_of(source.path)
        if kind in ("parquet", "arrow"):
            from jaxserve.batch_job.tables import read_table

            for line, (custom_id, prompt) in enumerate(read_table(source, column), start=1):
                place = f"{prefix}row {line}"
                yield _prompt_row(number, line, place, custom_id or f"{prefix}row-{line}", prompt, bare)
                number += 1
            continue
        with open_read(source.path) as file, explained(source.path):
            for line, data in _lines(file):
                place = f"{prefix}line {line}"
                if data is None:
                    error = BodyTooLarge(f"the line is longer than {MAX_LINE_BYTES} bytes; split it")
                    yield Row(number=number, line=line, place=place, error=error)
                elif data.isspace():
                    continue
                elif kind == "jsonl":
                    yield _json_row(number, line, place, data)
                else:
                    yield _text_row(number, line, place, f"{prefix}line-{line}", data, bare)
                number += 1


def count_rows(sources: list[Source]) -> int:
    """How many rows read_rows finds."""
    total = 0
    for source in sources:
        if kind_of(source.path) in ("parquet", "arrow"):
            from jaxserve.batch_job.tables import count_table

            total += count_table(source)
            continue
        with open_read(source.path) as file, explained(source.path):
            total += sum(data is None or not data.isspace() for _, data in _lines(file))
    return total


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is too long to be held."""
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(data) > MAX_LINE_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE_BYTES)
            yield line, None
        else:
            yield line, data


def _json_row(number: int, line: int, place: str, data: bytes) -> Row:
    custom_id: str | None = None
    try:
        found = _line_decoder.decode(data)
        custom_id = found.custom_id
        if found.method.upper() != "POST":
            raise InvalidParameter(f"method {found.method[:20]!r} is not served: write POST", param="method")
        return Row(number=number, line=line, place=place, custom_id=custom_id, url=found.url, body=bytes(found.body))
    except InvalidParameter as error:
        wrong = error
    except msgspec.ValidationError as error:
        wrong = InvalidParameter(f"not a line of OpenAI's batch format, custom_id, method, url and body: {error}")
        custom_id = _custom_id(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        wrong = InvalidParameter(f"not JSON: {str(error).removeprefix('JSON is malformed: ')}")
    except RecursionError:
        wrong = InvalidParameter("nested too deeply")
    return Row(number=number, line=line, place=place, custom_id=custom_id, error=wrong)


def _custom_id(data: bytes) -> str | None:
    try:
        found: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # behind what was wrong first
        return None
    name = found.get("custom_id") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _text_row(number: int, line: int, place: str, name: str, data: bytes, bare: str) -> Row:
    try:
        return _prompt_row(number, line, place, name, data.decode("utf-8").rstrip("\r\n"), bare)
    except UnicodeDecodeError as e:
        error = InvalidParameter(f"not UTF-8 at byte {e.start}: {e.reason}")
        return Row(number=number, line=line, place=place, custom_id=name, error=error)


def _prompt_row(number: int, line: int, place: str, custom_id: str, prompt: Any, bare: str) -> Row:
    """A row that is text, a list of messages, or neither."""
    url, body = CHAT, b""
    error: JaxserveError | None = None
    try:
        if prompt is None:
            raise InvalidParameter("the prompt is null", param="prompt")
        if not isinstance(prompt, str):
            body = msgspec.json.encode({"messages": prompt})
        elif bare == CHAT:
            if not prompt:  # the template's own text would be answered
                raise InvalidParameter("the prompt is empty", param="prompt")
            body = msgspec.json.encode({"messages": [{"role": "user", "content": prompt}]})
        else:
            url, body = bare, msgspec.json.encode({"input" if bare == EMBEDDINGS else "prompt": prompt})
    except InvalidParameter as e:
        error = e
    except (TypeError, UnicodeEncodeError) as e:
        error = InvalidParameter(f"messages cannot be written as JSON: {e}", param="messages")
    return Row(number=number, line=line, place=place, custom_id=custom_id, url=url, body=body, error=error)


class CustomIds:
    """The custom_ids seen so far. They lie in a nameless file once they are many, whose cache is all that is held."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -8192"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def checked(self, row: Row) -> Row:
        """The row, with an error if an earlier one had its custom_id. To be asked once for each row, in order."""
        first = None if row.custom_id is None else self._first(row.custom_id, row.place)
        if first is None or row.error is not None:
            return row
        error = InvalidParameter(f"custom_id {row.custom_id!r} was used before, in {first}", param="custom_id")
        return msgspec.structs.replace(row, error=error)

    def _first(self, custom_id: str, place: str) -> str | None:
        """The place of an earlier row with this custom_id; None if there is none."""
        key = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        try:
            if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, place)).rowcount:
                return None
            return str(self._db.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()[0])
        except sqlite3.Error as error:
            raise BatchStopped(
                f"cannot note custom_ids in a temporary file: {error}. What is done is safe: make room in /tmp, or "
                "name another folder with SQLITE_TMPDIR, then run the same again"
            ) from error

    def close(self) -> None:
        self._db.close()
