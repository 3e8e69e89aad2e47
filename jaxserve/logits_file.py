"""llama-perplexity's file of logits: a model's distributions of the scored tokens, 16 bits a word; reads and writes it.

    "_logits_", int32 ctx, int32 V, int32 C, tokens int32 [C, ctx]
    for each of C chunks and of its ctx - 1 - ctx / 2 scored tokens, in order:
        float32 scale, float32 lowest, uint16 [V], and one uint16 more where V is odd

Little endian. A word's log-probability is scale * number + lowest; what is less likely than e^-16 of the likeliest word
counts as that. The format has no version and no specification; it is what llama.cpp's tools/perplexity writes.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from jaxtyping import Float32, Int, UInt16

from jaxserve.errors import ConfigError

MAGIC = b"_logits_"
CUT = 16.0
"""Words less likely than e^-CUT of the likeliest are all kept as if they were that likely."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Distributions of N tokens over V words."""

    numbers: UInt16[np.ndarray, "N V"]
    scale: Float32[np.ndarray, " N"]
    lowest: Float32[np.ndarray, " N"]


def num_scored(ctx_size: int) -> int:
    """Tokens of a chunk that have a distribution: those predicted from its middle on."""
    return ctx_size - 1 - ctx_size // 2


class LogitsFile:
    """An open file, mapped into memory. Raises ConfigError for one that is none, or is not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                begin = file.read(len(MAGIC) + 12)
                size = file.seek(0, 2)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        if len(begin) < len(MAGIC) + 12 or not begin.startswith(MAGIC):
            raise ConfigError(
                f"{path} is no file of logits; write one with --save-all-logits, or llama-perplexity's "
                "--kl-divergence-base"
            )
        self.ctx_size, self.vocab, count = (int(n) for n in np.frombuffer(begin[len(MAGIC) :], "<i4"))
        if self.ctx_size < 4 or self.vocab < 1 or count < 1:
            raise ConfigError(f"{path} is damaged: {count} chunks of {self.ctx_size} tokens of {self.vocab} words")
        words, scored = _words(self.vocab), num_scored(self.ctx_size)
        tokens = 4 * count * self.ctx_size
        needed = len(begin) + tokens + 2 * count * scored * words
        if size < needed:
            raise ConfigError(f"{path} has {size} bytes, and its {count} chunks need {needed}; write it again")
        self.tokens: Int[np.ndarray, "C ctx"] = np.fromfile(
            path, "<i4", count * self.ctx_size, offset=len(begin)
        ).reshape(count, -1)
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocab:
            raise ConfigError(f"{path} is damaged: a token is not in its vocabulary of {self.vocab}")
        shape = (count, scored, words)
        self._rows = np.memmap(path, "<u2", mode="r", offset=len(begin) + tokens, shape=shape)

    def rows(self, chunk: int) -> Rows:
        """The distributions of a chunk's scored tokens."""
        found = np.array(self._rows[chunk])
        scale, lowest = found[:, :4].copy().view("<f4").T
        return Rows(found[:, 4 : 4 + self.vocab], scale, lowest)


class LogitsWriter:
    """Writes the file chunk by chunk: `with LogitsWriter(path, tokens, vocab) as out: out.add(rows)`.

    It appears under its name when all is written. Raises ConfigError where it cannot be written.
    """

    def __init__(self, path: Path, tokens: Int[np.ndarray, "C ctx"], vocab: int):
        self._path, self._staging = path, path.with_name(path.name + ".part")
        self._vocab, self._scored = vocab, num_scored(tokens.shape[1])
        try:
            self._file = open(self._staging, "wb")  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        self._file.write(MAGIC + np.array([tokens.shape[1], vocab, len(tokens)], "<i4").tobytes())
        self._file.write(tokens.astype("<i4").tobytes())

    def add(self, rows: Rows) -> None:
        """The next chunk's distributions."""
        assert rows.numbers.shape == (self._scored, self._vocab), rows.numbers.shape
        out = np.zeros((self._scored, _words(self._vocab)), "<u2")
        out[:, :4] = np.stack([rows.scale, rows.lowest], axis=1).astype("<f4").view("<u2")
        out[:, 4 : 4 + self._vocab] = rows.numbers
        self._file.write(out.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._staging.rename(self._path)
        else:
            self._staging.unlink()


def _words(vocab: int) -> int:
    """uint16s of a row: two float32 and an even count of numbers."""
    return 4 + vocab + vocab % 2
