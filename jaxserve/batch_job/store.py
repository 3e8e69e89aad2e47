"""The results of a job on local disk, each once whatever kills process or machine: a file in order, and a journal.

`PATH` holds the results of rows 0 to k - 1, a line each, and grows at its end. `PATH.job`, the journal, is what makes
that safe. Its lines are `CRC32 KIND ...`, the checksum being that of the rest of the line:

    head {...}                    the job: what a resume must agree with; the first line
    mark {...}                    PATH's first `size` bytes are on disk, hold `rows` rows and have this digest
    row NUMBER FAILED TOKENS ...  one result: the line that PATH gets

1. A result is appended to the journal by one write(2) as soon as it is there. From then on no death of the process
   loses it. Every SYNC_S seconds the journal is fsynced: the death of the machine loses that much work at most.
2. When all rows before it are there too, it is appended to PATH. That needs no fsync: it can be done again.
3. When the journal is JOURNAL_BYTES longer than need be, PATH is fsynced and a new journal written: head, mark, and
   the results that PATH does not have yet. It is fsynced, renamed over the old one, and the directory fsynced.
4. To resume, the journal counts up to the first line with a wrong checksum and is cut there: a torn write, or, after
   the machine died, what had not been fsynced. PATH must have the mark's digest up to its size; it is cut there, and
   gets the journal's results again. Rows that neither has are computed again, to the same bytes.
5. When all rows are there, the journal becomes head and mark alone, with `done`.

Whoever writes holds flock on the journal. Memory: an entry of the index for each result that waits for one before it.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from jaxserve.errors import BatchStopped, ConfigError

JOURNAL_BYTES = 16 * 2**20
SYNC_S = 1.0
_CHUNK = 2**20


class Mark(msgspec.Struct, omit_defaults=True):
    """How far PATH is."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    size: int = 0
    digest: str = ""
    done: bool = False
    published: bool = False
    """PATH was only on the way to something else, which has been made of it."""


class _Entry(NamedTuple):
    """A result that PATH lacks: where in the journal its line is, and what the journal says of it."""

    start: int
    length: int
    failed: int
    tokens: int


class Store:
    """See above. `head` is what the journal begins with, None where there is no job yet.

    Raises ConfigError when another process has it, or when the files are not what this wrote; BatchStopped when the
    disk does not take what is to be written, and from then on.
    """

    def __init__(self, path: Path):
        self.path = path
        self.journal = path.with_name(path.name + ".job")
        self.head: dict[str, str] | None = None
        self._fd = self._out = -1
        self._swap = threading.Lock()  # held while _fd changes or is closed, and while sync takes it
        self._syncing = threading.Lock()
        self._error: BatchStopped | None = None
        self._forget()
        if self.journal.exists():
            self._fd = _open_locked(self.journal)
            self.head = self._read_head()

    def _forget(self) -> None:
        self.rows = self.failed = self.tokens = 0  # rows in PATH; failed ones and tokens of all results
        self.done = self.published = self._dirty = False
        self._waiting: dict[int, _Entry] = {}
        self._size = self._end = 0  # of PATH and of the journal
        self._kept = 0  # of the journal, what a new one would have to hold as well
        self._digest = hashlib.blake2b(digest_size=20)

    @property
    def taken(self) -> bool:
        """Whether something is at PATH that no job accounts for."""
        return self.head is None and self.path.exists()

    @property
    def finished(self) -> int:
        """How many results there are."""
        return self.rows + len(self._waiting)

    @property
    def waiting(self) -> frozenset[int]:
        """Rows with a result that is not in PATH yet."""
        return frozenset(self._waiting)

    def __contains__(self, number: int) -> bool:
        return number < self.rows or number in self._waiting

    def begin(self, head: dict[str, str]) -> None:
        """Starts a job, in place of what there was."""
        with self._disk():
            if self._fd < 0:
                self._fd = _open_locked(self.journal)
                if self._read_head() is not None:
                    raise ConfigError(f"another process has just begun a job at {self.path}; give another OUT")
            self._forget()
            # In this order: a crash in between leaves a PATH without a job, which is never taken for a whole one.
            os.ftruncate(self._fd, 0)
            os.fsync(self._fd)
            self.path.unlink(missing_ok=True)
            self.head = head
            self._append(b"head " + msgspec.json.encode(head))
            self._kept = self._end
            os.fsync(self._fd)
            self._open_path()
            sync_directory(self.path.parent)

    def resume(self) -> None:
        """Takes up the job that was found: afterwards PATH holds all results that it can, and `in` knows them.

        Raises ConfigError, before anything is changed, if PATH is not what the job has written.
        """
        with self._disk():
            self._forget()
            mark = Mark()
            for start, line in self._records():
                kind, _, rest = line.partition(b" ")
                if kind == b"mark":
                    mark = msgspec.json.decode(rest, type=Mark)
                elif kind == b"row":
                    number, failed, tokens, result = rest.split(b" ", 3)
                    entry = _Entry(start + len(line) - len(result), len(result), int(failed), int(tokens))
                    self._waiting[int(number)] = entry
                self._end = start + len(line) + 1
            self._check_path(mark)
            self.rows, self._size = mark.rows, mark.size
            self.failed = mark.failed + sum(e.failed for e in self._waiting.values())
            self.tokens = mark.tokens + sum(e.tokens for e in self._waiting.values())
            self.done, self.published = mark.done, mark.published
            if self.published:
                return
            os.ftruncate(self._fd, self._end)
            self._open_path()
            os.ftruncate(self._out, self._size)
            self._copy()
            self._kept = sum(e.length for e in self._waiting.values())

    def add(self, number: int, result: bytes, *, failed: bool, tokens: int) -> None:
        """Takes in the result of row `number`, a line without its end."""
        assert number not in self, f"row {number} has a result already"
        assert b"\n" not in result
        with self._disk():
            self._append(b"row %d %d %d %s" % (number, failed, tokens, result))
            self._dirty = True
            self._waiting[number] = _Entry(self._end - 1 - len(result), len(result), failed, tokens)
            self.failed += failed
            self.tokens += tokens
            self._copy()
            if self._end > 2 * self._kept + JOURNAL_BYTES:
                self._renew()

    def sync(self) -> None:
        """Brings all results to the disk. Any thread may call this."""
        with self._syncing, self._disk():  # whoever comes meanwhile waits, and finds its results there
            if not self._dirty:
                return
            self._dirty = False
            with self._swap:
                fd = os.dup(self._fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def finish(self) -> None:
        """All rows are there."""
        assert not self._waiting, "rows are missing"
        with self._disk():
            self.done = True
            self._renew()

    def publish(self) -> None:
        """Removes PATH: what was to be made of it has been made, and is on the disk."""
        with self._disk():
            self.published = True
            self._renew()
            self.path.unlink()

    def close(self) -> None:
        """Brings all results to the disk, unless it has failed before, and lets go of the files."""
        try:
            if self._fd >= 0 and self._error is None:
                self.sync()
        finally:
            with self._swap:
                for fd in (self._fd, self._out):
                    if fd >= 0:
                        os.close(fd)
                self._fd = self._out = -1

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """(where in the journal it begins, content) of the records, up to the first that is not whole."""
        with open(os.dup(self._fd), "rb") as file:
            at = file.seek(0)
            for line in file:
                if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
                    return
                yield at + 9, line[9:-1]
                at += len(line)

    def _read_head(self) -> dict[str, str] | None:
        for _, line in self._records():
            if not line.startswith(b"head "):
                break
            return msgspec.json.decode(line[5:], type=dict[str, str])
        if self.journal.stat().st_size > 0 and not self._torn_head():
            raise ConfigError(f"{self.journal} is no journal of a job; move it away, or give another OUT")
        return None

    def _torn_head(self) -> bool:
        """Whether the journal is what a crash leaves of one whose first line was being written."""
        data = os.pread(self._fd, 14, 0)
        return not data.strip(b"\0") or data[9:] == b"head "[: len(data[9:])]

    def _append(self, line: bytes) -> None:
        try:
            self._end += _write(self._fd, _framed(line), self._end)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise

    def _copy(self) -> None:
        """Appends to PATH what can be."""
        parts, size = [], 0
        while (entry := self._waiting.pop(self.rows, None)) is not None:
            parts.append(os.pread(self._fd, entry.length, entry.start) + b"\n")
            size += entry.length + 1
            self.rows += 1
            if size >= _CHUNK or self.rows not in self._waiting:
                data = b"".join(parts)
                self._size += _write(self._out, data, self._size)
                self._digest.update(data)
                parts, size = [], 0

    def _check_path(self, mark: Mark) -> None:
        if mark.published:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        whole = size == mark.size if mark.done else size >= mark.size
        if whole and mark.size:
            with self.path.open("rb") as file:
                for at in range(0, mark.size, _CHUNK):
                    self._digest.update(file.read(min(_CHUNK, mark.size - at)))
            whole = self._digest.hexdigest() == mark.digest
        if not whole:
            raise ConfigError(
                f"{self.path} was changed or removed after this job wrote it: --overwrite begins the job again, or "
                f"remove {self.journal.name} as well"
            )

    def _open_path(self) -> None:
        if self._out >= 0:
            os.close(self._out)
        self._out = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _renew(self) -> None:
        """Puts a new journal in the place of the old one, with a mark."""
        os.fsync(self._out)
        new = self.journal.with_name(self.journal.name + ".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end, waiting = self._rewritten(fd)
            os.fsync(fd)
            os.replace(new, self.journal)
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise
        with self._swap:
            os.close(self._fd)
            self._fd, self._waiting, self._end, self._kept = fd, waiting, end, end
        sync_directory(self.path.parent)

    def _rewritten(self, fd: int) -> tuple[int, dict[int, _Entry]]:
        """Writes to `fd` what the journal has to hold; its length, and where in it the waiting results are."""
        waiting = self._waiting.values()
        mark = Mark(  # of PATH's rows only: those that wait are counted with their own lines
            self.rows,
            self.failed - sum(e.failed for e in waiting),
            self.tokens - sum(e.tokens for e in waiting),
            self._size,
            self._digest.hexdigest(),
            self.done,
            self.published,
        )
        end = _write(fd, _framed(b"head " + msgspec.json.encode(self.head)), 0)
        end += _write(fd, _framed(b"mark " + msgspec.json.encode(mark)), end)
        moved = {}
        for number, entry in sorted(self._waiting.items()):
            result = os.pread(self._fd, entry.length, entry.start)
            end += _write(fd, _framed(b"row %d %d %d %s" % (number, entry.failed, entry.tokens, result)), end)
            moved[number] = entry._replace(start=end - 1 - entry.length)
        return end, moved

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Says of an error of the disk what it means for the job. Nothing is written after one."""
        if self._error is not None:
            raise self._error
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            cure = "make room" if full else "mend that"
            self._error = BatchStopped(
                f"cannot write {self.path}: {error.strerror}. The {self.finished} rows that are done are safe: {cure}, "
                "then run the same again to go on"
            )
            raise self._error from error


def _framed(line: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(line), line)


def _write(fd: int, data: bytes, at: int) -> int:
    """Writes all of it, or raises OSError; how much that was."""
    done = os.pwrite(fd, data, at)
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)
    return done


def _open_locked(path: Path) -> int:
    """The file, made if need be, for this process alone. Raises ConfigError if another one has it."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(f"another process is at work on {path}; wait for it, or give another OUT") from None
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"cannot lock {path} ({error.strerror}): write to a disk that has locks") from error
        os.close(fd)  # renewed between the two calls


def sync_directory(path: Path) -> None:
    """Brings the names in a directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(fd)
