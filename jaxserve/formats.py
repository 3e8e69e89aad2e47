"""The block formats of ggml: their sizes, float32 rows to and from their bytes; knows nothing of files or models."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """How the numbers of a tensor's rows are packed."""

    name: str
    code: int
    """ggml's type id, as GGUF files give it."""
    block: int
    """Weights in a block; 1 for plain numbers."""
    nbytes: int
    """Bytes of a block."""

    @property
    def quantised(self) -> bool:
        return self.block > 1

    @property
    def group(self) -> int:
        """Of a quantised format: weights that share a scale."""
        return 16 if self.name in ("Q2_K", "Q3_K", "Q6_K") else 32

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` weights. Raises ValueError when blocks do not fill the row."""
        if k % self.block:
            raise ValueError(f"a row of {k} is not a multiple of {self.name}'s block of {self.block}")
        return k // self.block * self.nbytes


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix as a file stores it."""

    format: Format
    rows: np.ndarray  # uint8 [N, row_bytes]


FORMATS = {
    name: Format(name, code, block, nbytes)
    for name, code, block, nbytes in [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q8_0", 8, 32, 34),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("MXFP4", 39, 32, 17),
    ]
}
"""The formats that are computed here, by name."""

BY_CODE = {f.code: f for f in FORMATS.values()}

SMALLER_BLOCKS = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""What stands in for a format whose blocks do not fill the rows, as in llama.cpp."""

KNOWN_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}
"""ggml's other types, which error messages name."""

_CHUNK = 1 << 16
"""Weights worked on at a time: few enough for their temporary copies to stay in the processor's cache."""
_TRIES = 6
"""Scales that are tried for a group: about twice as many."""


def dequantise(format: Format, raw: np.ndarray) -> np.ndarray:
    """float32 [rows, K] of `raw`, uint8 [rows, row_bytes], in the arithmetic of the format's definition.

    Temporary memory is some MB, whatever the size. Raises ValueError when the bytes are no whole blocks.
    """
    rows, width = raw.shape
    if width % format.nbytes:
        raise ValueError(f"rows of {width} bytes are no whole blocks of {format.name}, which have {format.nbytes}")
    blocks = np.ascontiguousarray(raw).reshape(-1, format.nbytes)
    out = np.empty((len(blocks), format.block), np.float32)
    plain, step = _PLAIN.get(format.name), _CHUNK // format.block
    with np.errstate(invalid="ignore", over="ignore"):  # bytes may say that a scale is infinite or NaN
        for i in range(0, len(blocks), step):
            some = blocks[i : i + step]
            out[i : i + step] = plain(some) if plain is not None else _scaled(*_DECODERS[format.name](some))
    return out.reshape(rows, width // format.nbytes * format.block)


def parts(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What a quantised matrix is made of: codes, int8 [N, K], scales and minima, float32 [N, K / G].

    `dequantise` gives scale * code - minimum, computed in float32; minima are None where all are zero. Raises
    ValueError when the bytes are no whole blocks.
    """
    format, (rows, width) = blocks.format, blocks.rows.shape
    if width % format.nbytes:
        raise ValueError(f"rows of {width} bytes are no whole blocks of {format.name}, which have {format.nbytes}")
    raw = np.ascontiguousarray(blocks.rows).reshape(-1, format.nbytes)
    decode, groups = _DECODERS[format.name], format.block // format.group
    codes = np.empty((len(raw), format.block), np.int8)
    scales = np.empty((2, len(raw), groups), np.float32)
    found = 0
    step = _CHUNK // format.block
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(raw), step):
            codes[i : i + step], *others = decode(raw[i : i + step])
            found = len(others)
            for to, numbers in zip(scales, others, strict=False):
                to[i : i + step] = numbers
    per_row = [a.reshape(rows, -1) for a in (codes, *scales)]
    return per_row[0], per_row[1], per_row[2] if found == 2 else None


def quantise(format: Format, rows: np.ndarray, *, first: int = 0) -> np.ndarray:
    """uint8 [rows, row_bytes] of `rows`, float32 [rows, K]; temporary memory is some MB.

    Raises ValueError when blocks do not fill a row, and for values that are not finite or beyond the format's range,
    with the row's number, counted from `first`.
    """
    count, k = rows.shape
    nbytes = format.row_bytes(k)
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, format.block)
    out = np.empty((len(blocks), format.nbytes), np.uint8)
    encode = _ENCODERS[format.name]
    step = _CHUNK // format.block
    for i in range(0, len(blocks), step):
        chunk = blocks[i : i + step]
        finite = np.isfinite(chunk)
        if not finite.all():
            at = i * format.block + int(finite.argmin())
            raise ValueError(f"row {first + at // k} holds {blocks.flat[at]}, which {format.name} cannot store")
        try:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # a scale shows what was too large
                out[i : i + step] = encode(chunk)
        except _OutOfRange as error:
            row = first + (i + error.block) * format.block // k
            raise ValueError(f"row {row} holds numbers too large for {format.name}") from None
    return out.reshape(count, nbytes)


class _OutOfRange(Exception):
    def __init__(self, block: int):
        self.block = block


# Bytes and fields. In all formats a run of `width` bytes holds 8 // bits layers of `width` numbers: the lowest bits of
# all its bytes are the first `width` numbers, the next bits the next ones.


def _unpack(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The numbers in `data`, uint8 [B, n], as uint8 [B, n * 8 // bits]."""
    count, n = data.shape
    runs = data.reshape(count, n // width, width)
    out = np.empty((count, n // width, 8 // bits, width), np.uint8)
    for layer in range(8 // bits):
        np.right_shift(runs, layer * bits, out=out[:, :, layer])
    out &= (1 << bits) - 1
    return out.reshape(count, -1)


def _pack(numbers: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `_unpack`; bits of the numbers above `bits` are dropped."""
    count = len(numbers)
    layers = (numbers & ((1 << bits) - 1)).reshape(count, -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(layers << shifts, axis=2).reshape(count, -1)


def _half(data: np.ndarray) -> np.ndarray:
    """float32 [B, 1] from float16 in bytes [B, 2]."""
    return data.view("<f2").astype(np.float32)


def _half_bytes(numbers: np.ndarray) -> np.ndarray:
    """float16 in bytes [B, 2] of numbers [B] or [B, 1]. Raises _OutOfRange."""
    half = numbers.reshape(-1, 1).astype("<f2")
    finite = np.isfinite(half)
    if not finite.all():
        raise _OutOfRange(int(finite.argmin()))
    return half.view(np.uint8)


def _scaled(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """scales * codes - offsets, float32 [B, n], for codes [B, n] in equal groups with one scale each, [B, groups]."""
    values = codes.astype(np.float32).reshape(*scales.shape, -1)
    values *= scales[..., None]
    if offsets is not None:
        values -= offsets[..., None]
    return values.reshape(len(codes), -1)


# Sixteen 6-bit numbers in twelve bytes, in two ways.


def _unpack_scales_and_minima(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima, each uint8 [B, 8], of Q4_K and Q5_K."""
    first = data[:, :8] & 63
    second = _unpack(data[:, 8:], 4, 4) | (data[:, :8] >> 6) << 4
    return np.hstack([first[:, :4], second[:, :4]]), np.hstack([first[:, 4:], second[:, 4:]])


def _pack_scales_and_minima(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    first = np.hstack([scales[:, :4], minima[:, :4]])
    second = np.hstack([scales[:, 4:], minima[:, 4:]])
    return np.hstack([first | (second >> 4) << 6, _pack(second, 4, 4)])


def _unpack_q3_scales(data: np.ndarray) -> np.ndarray:
    """Sixteen scales, int8 [B, 16]."""
    return (_unpack(data[:, :8], 4, 8) | _unpack(data[:, 8:], 2, 4) << 4).view(np.int8) - np.int8(32)


def _pack_q3_scales(scales: np.ndarray) -> np.ndarray:
    raised = (scales + np.int8(32)).view(np.uint8)
    return np.hstack([_pack(raised, 4, 8), _pack(raised >> 4, 2, 4)])


# What the codes of a symmetric format stand for.


class _Integers:
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


class _Codebook:
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


_IQ4 = _Codebook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1_DOUBLED = _Codebook((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
_E8M0_HALVED = np.ldexp(np.float32(1), np.arange(256) - 128)  # subnormal at the low end; 255 is no NaN in ggml


type _Parts = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]

# Decoders: blocks, uint8 [B, nbytes], of plain numbers to float32 [B, block], of others to whole numbers [B, block] and
# the scales and, unless they are zero, minima [B, groups] with which they are numbers: scale * code - minimum.


def _decode_f32(b: np.ndarray) -> np.ndarray:
    return b.view("<f4")


def _decode_f16(b: np.ndarray) -> np.ndarray:
    return b.view("<f2").astype(np.float32)


def _decode_bf16(b: np.ndarray) -> np.ndarray:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_q8_0(b: np.ndarray) -> _Parts:
    return b[:, 2:].view(np.int8), _half(b[:, :2])


def _decode_q4_0(b: np.ndarray) -> _Parts:
    return _unpack(b[:, 2:], 4, 16).view(np.int8) - np.int8(8), _half(b[:, :2])


def _decode_q4_1(b: np.ndarray) -> _Parts:
    return _unpack(b[:, 4:], 4, 16), _half(b[:, :2]), -_half(b[:, 2:4])


def _decode_q5_0(b: np.ndarray) -> _Parts:
    codes = _unpack(b[:, 6:], 4, 16) | _unpack(b[:, 2:6], 1, 1) << 4
    return codes.view(np.int8) - np.int8(16), _half(b[:, :2])


def _decode_q5_1(b: np.ndarray) -> _Parts:
    codes = _unpack(b[:, 8:], 4, 16) | _unpack(b[:, 4:8], 1, 1) << 4
    return codes, _half(b[:, :2]), -_half(b[:, 2:4])


def _decode_q2_k(b: np.ndarray) -> _Parts:
    scales, minima = b[:, :16] & 15, b[:, :16] >> 4
    return _unpack(b[:, 16:80], 2, 32), _half(b[:, 80:82]) * scales, _half(b[:, 82:84]) * minima


def _decode_q3_k(b: np.ndarray) -> _Parts:
    codes = _unpack(b[:, 32:96], 2, 32) | _unpack(b[:, :32], 1, 32) << 2
    return codes.view(np.int8) - np.int8(4), _half(b[:, 108:110]) * _unpack_q3_scales(b[:, 96:108])


def _decode_q4_k(b: np.ndarray) -> _Parts:
    scales, minima = _unpack_scales_and_minima(b[:, 4:16])
    return _unpack(b[:, 16:], 4, 32), _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima


def _decode_q5_k(b: np.ndarray) -> _Parts:
    scales, minima = _unpack_scales_and_minima(b[:, 4:16])
    codes = _unpack(b[:, 48:], 4, 32) | _unpack(b[:, 16:48], 1, 32) << 4
    return codes, _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima


def _decode_q6_k(b: np.ndarray) -> _Parts:
    codes = _unpack(b[:, :128], 4, 64) | _unpack(b[:, 128:192], 2, 32) << 4
    return codes.view(np.int8) - np.int8(32), _half(b[:, 208:210]) * b[:, 192:208].view(np.int8)


def _decode_iq4_nl(b: np.ndarray) -> _Parts:
    return _IQ4.values(_unpack(b[:, 2:], 4, 16)), _half(b[:, :2])


def _decode_iq4_xs(b: np.ndarray) -> _Parts:
    scales = (_unpack(b[:, 4:8], 4, 1) | _unpack(b[:, 2:4], 2, 1) << 4).view(np.int8) - np.int8(32)
    return _IQ4.values(_unpack(b[:, 8:], 4, 16)), _half(b[:, :2]) * scales


def _decode_mxfp4(b: np.ndarray) -> _Parts:
    return _E2M1_DOUBLED.values(_unpack(b[:, 1:], 4, 16)), _E8M0_HALVED[b[:, :1]]


# Encoders: finite float32 [B, block] to blocks, uint8 [B, nbytes]. First the formats whose definition says what the
# codes are: the scale follows from the extremes, the codes are the nearest.


def _encode_f32(x: np.ndarray) -> np.ndarray:
    return x.astype("<f4", copy=False).view(np.uint8)


def _encode_f16(x: np.ndarray) -> np.ndarray:
    return _half_bytes(x)


def _encode_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    infinite = rounded & 0x7F800000 == 0x7F800000
    if infinite.any():
        raise _OutOfRange(int(infinite.argmax()))
    return (rounded >> 16).astype("<u2").view(np.uint8)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d; 0 where that is not a finite number."""
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _encode_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    whole = np.trunc(scaled)
    whole += np.trunc((scaled - whole) * 2)  # halves away from zero
    return np.hstack([_half_bytes(d), whole.astype(np.int8).view(np.uint8)])


def _extreme(x: np.ndarray) -> np.ndarray:
    """The number of largest magnitude of each row, with its sign: [B, 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)


def _signed_codes(x: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale [B, 1] and codes 0 .. 2 * bound - 1; the extreme has code 0."""
    d = _extreme(x) / np.float32(-bound)
    codes = np.trunc(x * _inverse(d) + np.float32(bound + 0.5))
    return d, np.minimum(codes, 2 * bound - 1).astype(np.uint8)


def _ranged_codes(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale and minimum [B, 1] and codes 0 .. top."""
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((x - low) * _inverse(d) + np.float32(0.5))
    return d, low, np.minimum(codes, top).astype(np.uint8)


def _encode_q4_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_codes(x, 8)
    return np.hstack([_half_bytes(d), _pack(codes, 4, 16)])


def _encode_q4_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _ranged_codes(x, 15)
    return np.hstack([_half_bytes(d), _half_bytes(low), _pack(codes, 4, 16)])


def _encode_q5_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_codes(x, 16)
    return np.hstack([_half_bytes(d), _pack(codes >> 4, 1, 1), _pack(codes, 4, 16)])


def _encode_q5_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _ranged_codes(x, 31)
    return np.hstack([_half_bytes(d), _half_bytes(low), _pack(codes >> 4, 1, 1), _pack(codes, 4, 16)])


def _encode_mxfp4(x: np.ndarray) -> np.ndarray:
    # The exponent that puts the largest number into [4, 8) clips what is above 6; the next one never clips and has
    # coarser steps. The smaller error decides.
    _, exponent = np.frexp(np.abs(x).max(1, keepdims=True))

    def at(e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = _E2M1_DOUBLED.codes(np.ldexp(x, 128 - e))
        left = np.float64(x) - _scaled(_E2M1_DOUBLED.values(codes), _E8M0_HALVED[e])
        return codes, _dot(left, left)[:, None]

    low = np.clip(exponent + 124, 0, 254)
    high = np.minimum(low + 1, 254)
    (codes, error), (coarse, coarse_error) = at(low), at(high)
    use = coarse_error < error
    return np.hstack([np.where(use, high, low).astype(np.uint8), _pack(np.where(use, coarse, codes), 4, 16)])


# Then the formats that leave the choice of scales to whoever writes them: of several scales near that of the extremes,
# each with the least-squares fit to the codes that it gives, the one with the smallest error is taken. Large weights
# count for more, as they do in the products.

_NOTHING = 1e-12
"""A group of smaller numbers is stored as zeros: no scale of float16 comes near it."""


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...n,...n->...", a, b)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _weights(y: np.ndarray) -> np.ndarray:
    """What an error in each of y, [G, n], of the order of 1, counts."""
    return np.abs(y) + np.sqrt(np.mean(np.square(y), 1, keepdims=True))


def _symmetric_scales(x: np.ndarray, grid: _Integers | _Codebook, reach: float) -> np.ndarray:
    """Scales [G] with which numbers of `grid` best give x, [G, n]; the extreme falls by `reach` around its ends."""
    peak = _extreme(x)
    peak[np.abs(peak) < _NOTHING] = 0
    y = _quotient(x, peak)  # the extreme is now 1
    weights = _weights(y)
    weighted = weights * y
    best = np.zeros(len(x), np.float32)
    scale = np.zeros(len(x), np.float32)

    def try_codes(q: np.ndarray) -> None:
        # The error is what the fit leaves of sum(w * y**2): the larger this quotient, the smaller.
        product = _dot(weighted, q)
        fit = _quotient(product, _dot(weights * q, q))
        better = product * fit > best
        np.copyto(best, product * fit, where=better)
        np.copyto(scale, fit, where=better)

    for ratio in np.linspace(1 - reach, 1 + reach, _TRIES, dtype=np.float32):
        try_codes(grid.nearest(y * (grid.low * ratio)))
    for ratio in np.linspace(1 - reach, 1 + reach, _TRIES // 2, dtype=np.float32):
        try_codes(grid.nearest(y * (grid.high * ratio)))
    try_codes(grid.nearest(y * _inverse(scale)[:, None]))
    return scale * peak[:, 0]


def _fit_symmetric(
    x: np.ndarray, n: int, grid: _Integers | _Codebook, reach: float, bound: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block scale in bytes [B, 2], group scales -bound .. bound - 1, int8 [B, block / n], and codes [B, block]."""
    scales = _symmetric_scales(x.reshape(-1, n), grid, reach).reshape(len(x), -1)
    d = _half(_half_bytes(_extreme(scales) / np.float32(-bound)))
    whole = np.clip(np.rint(_quotient(scales, d)), -bound, bound - 1)
    codes = grid.codes(x.reshape(*whole.shape, n) * _inverse(d * whole)[..., None])
    # The group scales have been rounded: the block's own scale takes the value that is best for them.
    q = (grid.values(codes) * whole[..., None]).reshape(x.shape)
    d *= _refit(_quotient(x, d), q)
    return _half_bytes(d), whole.astype(np.int8), codes.reshape(x.shape)


def _refit(y: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The factor [B, 1] that q needs to be nearest to y, both [B, n]; 1 where any will do."""
    weighted = _weights(y) * q
    squares = _dot(weighted, q)[:, None]
    return np.where(squares > 0, _quotient(_dot(weighted, y)[:, None], squares), np.float32(1))


def _affine_scales(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset), both [G] and not negative, with which scale * (0 .. top) - offset best gives x, [G, n]."""
    low = np.minimum(x.min(1, keepdims=True), 0)
    span = x.max(1, keepdims=True) - low
    span[span < _NOTHING] = 0
    y = _quotient(x - low, span)  # 0 .. 1, of which sums lose no digits to a common offset
    weights = _weights(_quotient(x, np.maximum(span, -low)))
    weighted = weights * y
    w, wy = weights.sum(1), weighted.sum(1)
    highest = _quotient(-low, span)[:, 0]  # what keeps the offset from being negative
    best, scale, shift = np.zeros((3, len(x)), np.float32)

    def try_codes(q: np.ndarray) -> None:
        np.clip(np.rint(q, out=q), 0, top, out=q)
        wq, wyq = _dot(weights, q), _dot(weighted, q)
        wqq = _dot(weights * q, q)
        c = _quotient(wqq * wy - wq * wyq, wqq * w - wq * wq)
        c = np.minimum(c, highest)
        a = np.maximum(_quotient(wyq - c * wq, wqq), 0)
        # By how much the weighted squares of y fall when the fit is taken off.
        gain = 2 * (a * wyq + c * wy) - a * a * wqq - 2 * a * c * wq - c * c * w
        better = gain > best
        for kept, new in ((best, gain), (scale, a), (shift, c)):
            np.copyto(kept, new, where=better)

    for steps in top + np.linspace(-1, 1, 2 * _TRIES, dtype=np.float32):
        try_codes(y * steps)
    try_codes((y - shift[:, None]) * _inverse(scale)[:, None])
    span, low = span[:, 0], low[:, 0]
    return scale * span, np.maximum(-(low + shift * span), 0)


def _fit_affine(
    x: np.ndarray, n: int, top: int, levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Block scale and offset in bytes [B, 2], those of the groups, uint8 [B, block / n], and codes [B, block]."""
    scales, offsets = (f.reshape(len(x), -1) for f in _affine_scales(x.reshape(-1, n), top))
    parts, wholes = [], []
    for factors in (scales, offsets):
        d = _half(_half_bytes(factors.max(1, keepdims=True) / np.float32(levels)))
        parts.append(d)
        wholes.append(np.clip(np.rint(_quotient(factors, d)), 0, levels))
    d, low = parts
    groups = x.reshape(*scales.shape, n)
    steps = (groups + (low * wholes[1])[..., None]) * _inverse(d * wholes[0])[..., None]
    codes = np.clip(np.rint(steps, out=steps), 0, top, out=steps)
    d, low = _refit_pair(groups, codes * wholes[0][..., None], wholes[1], d, low)
    whole = [w.astype(np.uint8) for w in wholes]
    return _half_bytes(d), _half_bytes(low), *whole, codes.astype(np.uint8).reshape(x.shape)


def _refit_pair(
    groups: np.ndarray, q: np.ndarray, minima: np.ndarray, d: np.ndarray, low: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """d and low, [B, 1], with which d * q - low * minima is nearest to groups, [B, groups, n]; unsure, as given."""
    unit = np.abs(groups).max((1, 2), keepdims=True)
    y = _quotient(groups, unit).reshape(len(groups), -1).astype(np.float64)
    a, b = q.reshape(y.shape), np.repeat(minima, groups.shape[2], 1)
    weights = _weights(y)
    aa, ab, bb = _dot(weights * a, a), _dot(weights * a, b), _dot(weights * b, b)
    ya, yb = _dot(weights * y, a), _dot(weights * y, b)
    with np.errstate(divide="ignore"):
        both = np.stack([ya * bb - yb * ab, ya * ab - yb * aa]) / (aa * bb - ab * ab)
        alone = np.stack([ya / aa, np.zeros_like(ya)])
    fit = np.where(bb > 0, both, alone) * unit[:, 0, 0]
    # Nearly parallel a and b leave the two undetermined; what the search found is near the truth.
    given = np.stack([d[:, 0], low[:, 0]])
    sure = (np.abs(fit - given) <= 0.1 * given).all(0)
    fitted = np.where(sure, fit, given).astype(np.float32)
    return fitted[0, :, None], fitted[1, :, None]


def _encode_q2_k(x: np.ndarray) -> np.ndarray:
    d, low, scales, minima, codes = _fit_affine(x, 16, 3, 15)
    return np.hstack([scales | minima << 4, _pack(codes, 2, 32), d, low])


def _encode_q3_k(x: np.ndarray) -> np.ndarray:
    d, scales, codes = _fit_symmetric(x, 16, _Integers(4), 0.25, 32)
    return np.hstack([_pack(codes >> 2, 1, 32), _pack(codes, 2, 32), _pack_q3_scales(scales), d])


def _encode_q4_k(x: np.ndarray) -> np.ndarray:
    d, low, scales, minima, codes = _fit_affine(x, 32, 15, 63)
    return np.hstack([d, low, _pack_scales_and_minima(scales, minima), _pack(codes, 4, 32)])


def _encode_q5_k(x: np.ndarray) -> np.ndarray:
    d, low, scales, minima, codes = _fit_affine(x, 32, 31, 63)
    return np.hstack([d, low, _pack_scales_and_minima(scales, minima), _pack(codes >> 4, 1, 32), _pack(codes, 4, 32)])


def _encode_q6_k(x: np.ndarray) -> np.ndarray:
    d, scales, codes = _fit_symmetric(x, 16, _Integers(32), 0.03, 128)
    return np.hstack([_pack(codes, 4, 64), _pack(codes >> 4, 2, 32), scales.view(np.uint8), d])


def _encode_iq4_nl(x: np.ndarray) -> np.ndarray:
    d = _symmetric_scales(x, _IQ4, 0.08)[:, None]
    codes = _IQ4.codes(x * _inverse(_half(_half_bytes(d))))
    d *= _refit(_quotient(x, d), _IQ4.values(codes))
    return np.hstack([_half_bytes(d), _pack(codes, 4, 16)])


def _encode_iq4_xs(x: np.ndarray) -> np.ndarray:
    d, scales, codes = _fit_symmetric(x, 32, _IQ4, 0.08, 32)
    raised = (scales + np.int8(32)).view(np.uint8)
    return np.hstack([d, _pack(raised >> 4, 2, 1), _pack(raised, 4, 1), _pack(codes, 4, 16)])


_PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "BF16": _decode_bf16,
}

_DECODERS: dict[str, Callable[[np.ndarray], _Parts]] = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
    "MXFP4": _decode_mxfp4,
}
_ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q2_K": _encode_q2_k,
    "Q3_K": _encode_q3_k,
    "Q4_K": _encode_q4_k,
    "Q5_K": _encode_q5_k,
    "Q6_K": _encode_q6_k,
    "IQ4_NL": _encode_iq4_nl,
    "IQ4_XS": _encode_iq4_xs,
    "MXFP4": _encode_mxfp4,
}
