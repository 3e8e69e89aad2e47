"""What the bytes of blocks are made of: numbers of few bits, float16, packed scales, tables of codes."""

import numpy as np

CHUNK = 1 << 16
"""Weights worked on at a time: few enough for their temporary copies to stay in the processor's cache."""


class OutOfRange(Exception):
    """A block's scale, or number, is beyond what its format has room for."""

    def __init__(self, block: int):
        self.block = block


# In all formats a run of `width` bytes holds 8 // bits layers of `width` numbers: the lowest bits of all its bytes are
# the first `width` numbers, the next bits the next ones.


def unpack(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The numbers in `data`, uint8 [B, n], as uint8 [B, n * 8 // bits]."""
    count, n = data.shape
    runs = data.reshape(count, n // width, width)
    out = np.empty((count, n // width, 8 // bits, width), np.uint8)
    for layer in range(8 // bits):
        np.right_shift(runs, layer * bits, out=out[:, :, layer])
    out &= (1 << bits) - 1
    return out.reshape(count, -1)


def pack(numbers: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `unpack`; bits of the numbers above `bits` are dropped."""
    count = len(numbers)
    layers = (numbers & ((1 << bits) - 1)).reshape(count, -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(layers << shifts, axis=2).reshape(count, -1)


def half(data: np.ndarray) -> np.ndarray:
    """float32 [B, 1] from float16 in bytes [B, 2]."""
    return data.view("<f2").astype(np.float32)


def half_bytes(numbers: np.ndarray) -> np.ndarray:
    """float16 in bytes [B, 2] of numbers [B] or [B, 1]. Raises OutOfRange."""
    halves = numbers.reshape(-1, 1).astype("<f2")
    finite = np.isfinite(halves)
    if not finite.all():
        raise OutOfRange(int(finite.argmin()))
    return halves.view(np.uint8)


def scaled(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """scales * codes - offsets, float32 [B, n], for codes [B, n] in equal groups with one scale each, [B, groups]."""
    values = codes.astype(np.float32).reshape(*scales.shape, -1)
    values *= scales[..., None]
    if offsets is not None:
        values -= offsets[..., None]
    return values.reshape(len(codes), -1)


# Sixteen 6-bit numbers in twelve bytes, in two ways.


def unpack_scales_and_minima(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima, each uint8 [B, 8], of Q4_K and Q5_K."""
    first = data[:, :8] & 63
    second = unpack(data[:, 8:], 4, 4) | (data[:, :8] >> 6) << 4
    return np.hstack([first[:, :4], second[:, :4]]), np.hstack([first[:, 4:], second[:, 4:]])


def pack_scales_and_minima(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    first = np.hstack([scales[:, :4], minima[:, :4]])
    second = np.hstack([scales[:, 4:], minima[:, 4:]])
    return np.hstack([first | (second >> 4) << 6, pack(second, 4, 4)])


def unpack_q3_scales(data: np.ndarray) -> np.ndarray:
    """Sixteen scales, int8 [B, 16]."""
    return (unpack(data[:, :8], 4, 8) | unpack(data[:, 8:], 2, 4) << 4).view(np.int8) - np.int8(32)


def pack_q3_scales(scales: np.ndarray) -> np.ndarray:
    raised = (scales + np.int8(32)).view(np.uint8)
    return np.hstack([pack(raised, 4, 8), pack(raised >> 4, 2, 4)])


# What the codes of a symmetric format stand for.


class Integers:
    """-bound .. bound - 1; a code is the number plus bound."""

    def __init__(self, bound: int):
        self.low, self.high = -bound, bound - 1

    def nearest(self, numbers: np.ndarray) -> np.ndarray:
        """The representable number next to each; may write over its argument."""
        np.rint(numbers, out=numbers)
        return np.clip(numbers, self.low, self.high, out=numbers)

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        return (self.nearest(numbers) - self.low).astype(np.uint8)

    def values(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.float32) + self.low


class Codebook:
    """A table of whole numbers; a code is a place in it."""

    def __init__(self, table: tuple[int, ...]):
        self.table = np.array(table, np.float32)
        self.low, self.high = min(table), max(table)
        # Whole numbers change their nearest neighbour at multiples of a half only: cells of a half need no search.
        middle = np.arange(2 * self.low, 2 * self.high + 1) / 2 + 0.25
        self._cells = np.abs(middle[:, None] - self.table).argmin(1).astype(np.uint8)

    def nearest(self, numbers: np.ndarray) -> np.ndarray:
        return self.table[self.codes(numbers)]

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        cells = np.floor(2 * numbers - 2 * self.low)
        return self._cells[np.clip(cells, 0, len(self._cells) - 1, out=cells).astype(np.intp)]

    def values(self, codes: np.ndarray) -> np.ndarray:
        return self.table[codes]


IQ4 = Codebook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
E2M1_DOUBLED = Codebook((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
E8M0_HALVED = np.ldexp(np.float32(1), np.arange(256) - 128)  # subnormal at the low end; 255 is no NaN in ggml
