"""The captured values of a job, beside its output: a row for each token, every one once whatever kills the process.

OUT.capture/ holds, in the order of the input,

    rows-000000000-000004095.arrow ...  Arrow IPC files, each of the values of the job's rows FIRST to LAST
    pieces/NUMBER-PROMPT-CHOICE         the values of one sequence, an Arrow stream, until its row is in a file

with the columns of COLUMNS and one of each value.

1. A sequence's values are appended to its piece as they come.
2. When its row is answered, the pieces are brought to the disk, and only then the store takes the result. So a row that
   it knows has all of its pieces, and those of any other row are removed when the job goes on.
3. When rows without a gap are enough for a file, it is written under another name, brought to the disk and renamed, and
   then their pieces are removed. What is in it depends on nothing but the values.

Memory: a batch for each sequence that is running.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve.batch_job.files import EXTRA
from jaxserve.batch_job.rows import Row
from jaxserve.batch_job.store import Store, sync_directory
from jaxserve.captured import dtype_of, token_bytes, values
from jaxserve.errors import BatchStopped, ConfigError
from jaxserve.request import TapInfo
from jaxserve.text import TextDelta

COLUMNS = ("row", "custom_id", "prompt", "choice", "position", "token_id", "generated")
"""Number of the input's row from 0; its id; which of its prompts, and which answer to that; the token's place in prompt
and answer, from 0; the token; whether it is of the answer."""
FILE_ROWS, FILE_BYTES = 4096, 2**28
"""A file of values ends with the row that brings it to either."""
BATCH_TOKENS, BATCH_BYTES = 1024, 2**20
"""Tokens of a sequence that are written together: so many, or of so many bytes."""

_FILE = re.compile(r"rows-(\d{9,})-(\d{9,})\.arrow")
_PIECE = re.compile(r"(\d+)-(\d+)-(\d+)")
_COUNT = b"jaxserve.captured_rows"


def folder_of(output: Path) -> Path:
    """Where the values of a job with this output lie."""
    return output.with_name(output.name + ".capture")


def check_installed() -> None:
    """Raises ConfigError, with the cure, where there is no pyarrow."""
    _pyarrow()


class _Piece(NamedTuple):
    """A sequence's values on the disk."""

    prompt: int
    choice: int
    size: int


class Captures:
    """The values of one job. Raises BatchStopped when the disk does not take what is to be written.

    `record` and what it gives belong to one thread, in which `due` is asked as well; `write` may run in another one.
    """

    def __init__(self, folder: Path, taps: Sequence[TapInfo]):
        self.folder, self.taps = folder, tuple(taps)
        self.schema = _schema(self.taps)
        self._pieces = folder / "pieces"
        self._rows: dict[int, list[_Piece]] = {}  # answered, and in no file yet
        self._first = 0  # the first row that is in no file
        self._end, self._size = 0, 0  # the rows from there on that have been looked at, and how many bytes these have

    def begin(self, store: Store) -> None:
        """Takes up what there is of the job of `store`, or makes room for it where that has no result.

        Raises ConfigError when it is not what the job has written.
        """
        with _disk(self.folder):
            self._pieces.mkdir(parents=True, exist_ok=True)
            files, pieces = self._found()
            if not store.finished:
                for path in (*files, *pieces):
                    path.unlink()
                files, pieces = [], []
            counted = self._take_files(files, store)
            for path in pieces:
                row, prompt, choice = map(int, _PIECE.fullmatch(path.name).groups())  # type: ignore[union-attr]
                if row < self._first or row not in store:
                    path.unlink()
                else:
                    self._rows.setdefault(row, []).append(_Piece(prompt, choice, path.stat().st_size))
            sync_directory(self.folder)
        if counted + len(self._rows) != store.finished - store.failed:
            raise self._changed()

    def record(self, row: Row, prompts: Sequence[Sequence[int]]) -> "Recording":
        """Takes in the values of a row, which has these prompts."""
        return Recording(self, row, prompts)

    def due(self, rows: int, *, last: bool = False) -> bool:
        """Whether a file is to be written, given that the first `rows` rows of the job are answered.

        `last`: these are all.
        """
        while self._end < rows and not self._enough():
            self._size += sum(piece.size for piece in self._rows.get(self._end, ()))
            self._end += 1
        return self._enough() or (last and self._end > self._first)

    def write(self) -> None:
        """Writes the file that is due."""
        pa, numbers = _pyarrow(), range(self._first, self._end)
        path = self.folder / f"rows-{numbers[0]:09d}-{numbers[-1]:09d}.arrow"
        new = path.with_suffix(".new")
        captured = [row for row in numbers if row in self._rows]
        pieces = [self._path(row, piece) for row in captured for piece in sorted(self._rows[row])]
        with _disk(self.folder):
            with new.open("wb") as file:
                schema = self.schema.with_metadata({_COUNT: str(len(captured))})
                with pa.ipc.new_file(file, schema) as writer:
                    for piece in pieces:
                        with piece.open("rb") as data, pa.ipc.open_stream(data) as batches:
                            for batch in batches:
                                writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            sync_directory(self.folder)
            for piece in pieces:
                piece.unlink()
        for row in captured:
            del self._rows[row]
        self._first, self._size = self._end, 0

    def finish(self) -> None:
        """All values are in files."""
        with _disk(self.folder):
            self._pieces.rmdir()
            sync_directory(self.folder)

    def answered(self, row: int, pieces: list[_Piece]) -> None:
        """The row's pieces are on the disk, and its result is about to be in the store."""
        self._rows[row] = pieces

    def piece_path(self, row: int, prompt: int, choice: int) -> Path:
        return self._pieces / f"{row}-{prompt}-{choice}"

    def _path(self, row: int, piece: _Piece) -> Path:
        return self.piece_path(row, piece.prompt, piece.choice)

    def _enough(self) -> bool:
        return self._end - self._first >= FILE_ROWS or self._size >= FILE_BYTES

    def _found(self) -> tuple[list[Path], list[Path]]:
        """Files in their order, and pieces; what was on the way to be a file is removed."""
        files = []
        for path in sorted(self.folder.iterdir()):
            if _FILE.fullmatch(path.name):
                files.append(path)
            elif path.suffix == ".new":
                path.unlink()
        return files, [path for path in self._pieces.iterdir() if _PIECE.fullmatch(path.name)]

    def _take_files(self, files: Iterable[Path], store: Store) -> int:
        """How many rows have values in the files."""
        pa, counted = _pyarrow(), 0
        for path in files:
            first, last = map(int, _FILE.fullmatch(path.name).groups())  # type: ignore[union-attr]
            try:
                with pa.memory_map(str(path)) as source:
                    metadata = pa.ipc.open_file(source).schema.metadata or {}
                counted += int(metadata[_COUNT])
            except (pa.ArrowException, KeyError, ValueError) as error:
                raise self._changed() from error
            if first != self._first or last >= store.rows:
                raise self._changed()
            self._first = self._end = last + 1
        return counted

    def _changed(self) -> ConfigError:
        return ConfigError(
            f"{self.folder} was changed or removed after this job wrote it: --overwrite begins the job again"
        )


class Recording:
    """The values of one row as they come. Give it every delta, then call `finish`; or `drop` if the row failed."""

    def __init__(self, captures: Captures, row: Row, prompts: Sequence[Sequence[int]]):
        self._captures, self._row, self._prompts = captures, row, prompts
        self._sequences: dict[tuple[int, int], _Sequence] = {}

    def add(self, prompt: int, delta: TextDelta) -> None:
        """Takes in a delta of one of the row's prompts."""
        key = prompt, delta.index
        sequence = self._sequences.get(key)
        if sequence is None:
            path = self._captures.piece_path(self._row.number, *key)
            sequence = _Sequence(path, self._captures, self._row, key, self._prompts[prompt])
            self._sequences[key] = sequence
        with _disk(self._captures.folder):
            sequence.add(delta)

    def finish(self) -> list[_Piece]:
        """Brings all of them to the disk; takes a while, and may run in another thread. See Captures.answered."""
        with _disk(self._captures.folder):
            pieces = [_Piece(*key, sequence.finish()) for key, sequence in self._sequences.items()]
            self._sync_names()
            return pieces

    def drop(self) -> None:
        """The row has no values."""
        with _disk(self._captures.folder):
            for sequence in self._sequences.values():
                sequence.path.unlink(missing_ok=True)
            self._sync_names()  # a piece that came back would be taken for the values of a row that failed
        self._sequences.clear()

    def _sync_names(self) -> None:
        if self._sequences:
            sync_directory(next(iter(self._sequences.values())).path.parent)


class _Sequence:
    """A prompt and one answer to it: the values that are not written yet, and the file where the others are."""

    def __init__(self, path: Path, captures: Captures, row: Row, key: tuple[int, int], prompt: Sequence[int]):
        self.path = path
        self._schema, self._taps, self._row, self._key = captures.schema, captures.taps, row, key
        self._tokens, self._num_prompt = list(prompt), len(prompt)
        self._held = [bytearray() for _ in self._taps]
        self._written = 0  # positions
        self._sizes = [token_bytes([tap]) for tap in self._taps]
        self._most = min(BATCH_TOKENS, max(1, BATCH_BYTES // max(1, sum(self._sizes))))

    def add(self, delta: TextDelta) -> None:
        if delta.captured is not None:
            for held, data in zip(self._held, delta.captured, strict=True):
                held += data
        while self._waiting >= self._most:
            self._write(self._most)
        self._tokens += delta.token_ids  # which the next step has read, so that values of theirs come later

    def finish(self) -> int:
        """Brings all of it to the disk; how many bytes that is."""
        if waiting := self._waiting:
            self._write(waiting)
        assert self._written == max(self._num_prompt, len(self._tokens) - 1), "a position's values are missing"
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    @property
    def _waiting(self) -> int:
        return len(self._held[0]) // self._sizes[0]

    def _write(self, count: int) -> None:
        """Appends a batch of `count` positions; the first one replaces what an earlier try has left."""
        pa, first = _pyarrow(), self._written
        positions = np.arange(first, first + count, dtype=np.int32)
        columns = [
            pa.array(np.full(count, self._row.number, np.int64)),
            pa.array([self._row.custom_id] * count, pa.string()),
            *(pa.array(np.full(count, part, np.int32)) for part in self._key),
            pa.array(positions),
            pa.array(np.array(self._tokens[first : first + count], np.int32)),
            pa.array(positions >= self._num_prompt),
        ]
        for tap, held, size in zip(self._taps, self._held, self._sizes, strict=True):
            columns.append(_array(values(tap, held[: count * size])))
            del held[: count * size]
        batch = pa.record_batch(columns, schema=self._schema)
        with self.path.open("ab" if first else "wb") as file:
            if not first:
                file.write(self._schema.serialize())
            file.write(batch.serialize())
        self._written += count


def _schema(taps: Sequence[TapInfo]) -> Any:
    pa = _pyarrow()
    kinds = (pa.int64(), pa.string(), pa.int32(), pa.int32(), pa.int32(), pa.int32(), pa.bool_())
    fields = list(zip(COLUMNS, kinds, strict=True))
    for tap in taps:
        kind = pa.from_numpy_dtype(dtype_of(tap))
        for size in reversed(tap.shape):
            kind = pa.list_(kind, size)
        fields.append((tap.name, kind))
    if taken := sorted({tap.name for tap in taps} & set(COLUMNS)):
        raise ConfigError(f"capture {taken[0]!r} is a column of its own in the files; give the value another name")
    return pa.schema(fields)


def _array(found: np.ndarray) -> Any:
    """An Arrow array of found.shape[0] entries, lists of fixed sizes as deep as there are further axes."""
    pa = _pyarrow()
    array = pa.array(found.reshape(-1))
    for size in reversed(found.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Says of an error of the disk what it means for the job."""
    try:
        yield
    except OSError as error:
        raise BatchStopped(
            f"cannot write {folder}: {error.strerror or error}. The rows that are done are safe: mend that, then run "
            "the same again to go on"
        ) from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ConfigError(f"capture writes Arrow files, which need pyarrow: {EXTRA}") from None
    return pyarrow
