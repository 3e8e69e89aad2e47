"""The block formats against the `gguf` package, against what each can hold, and on the numbers that break them."""

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType

from jaxserve.formats import BY_CODE, FORMATS, KNOWN_NAMES, Format, dequantise, quantise
from jaxserve.gguf import GgufFile

QUANTISED = [f for f in FORMATS.values() if f.quantised]
ROUNDED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]  # the definition leaves no choice
SEARCHED = {
    "Q2_K": 0.275, "Q3_K": 0.147, "Q4_K": 0.0725, "Q5_K": 0.0363, "Q6_K": 0.0172, "IQ4_NL": 0.075, "IQ4_XS": 0.0757,
}  # fmt: skip
"""What normally distributed weights may lose, relative root mean square."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def by_name(name: str) -> pytest.param:
    return pytest.param(FORMATS[name], id=name)


every = pytest.mark.parametrize("format", [by_name(name) for name in FORMATS])
every_quantised = pytest.mark.parametrize("format", [by_name(f.name) for f in QUANTISED])


def oracle(format: Format, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw.copy(), GgmlType[format.name])


def error(x: np.ndarray, format: Format) -> float:
    """Root mean square of what storing changes, over that of x."""
    return float(np.sqrt(np.mean(np.square(dequantise(format, quantise(format, x)) - x)) / np.mean(np.square(x))))


# --- what the formats are


@every
def test_sizes_and_codes_are_ggmls(format: Format) -> None:
    assert gguf.GGML_QUANT_SIZES[GgmlType[format.name]] == (format.block, format.nbytes)
    assert GgmlType[format.name] == format.code and BY_CODE[format.code] is format
    assert format.quantised == (format.name not in ("F32", "F16", "BF16"))
    assert format.row_bytes(512) == 512 // format.block * format.nbytes


def test_the_other_types_are_known_by_name() -> None:
    theirs = {int(t): t.name for t in GgmlType}
    assert not BY_CODE.keys() & KNOWN_NAMES.keys()
    assert all(KNOWN_NAMES[code] == name for code, name in theirs.items() if code in KNOWN_NAMES)


@every_quantised
def test_a_row_of_broken_blocks_is_refused(format: Format) -> None:
    with pytest.raises(ValueError, match=f"40 is not a multiple of {format.name}'s block of {format.block}"):
        format.row_bytes(40)
    with pytest.raises(ValueError, match="40 is not a multiple"):
        quantise(format, np.zeros((2, 40), np.float32))
    with pytest.raises(ValueError, match=f"no whole blocks of {format.name}"):
        dequantise(format, np.zeros((2, format.nbytes + 1), np.uint8))


# --- bytes to numbers


@every
def test_any_bytes_mean_what_the_gguf_package_reads(format: Format, rng: np.random.Generator) -> None:
    raw = rng.integers(0, 256, (9, 5 * format.nbytes), dtype=np.uint8)
    found = dequantise(format, raw)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, oracle(format, raw))  # infinite and NaN scales are among them


@every
def test_the_extremes_of_every_field(format: Format) -> None:
    """Every byte value in every place, the others 0 or 255: no carry from one field into another."""
    cases = [np.full((256, format.nbytes), rest, np.uint8) for rest in (0, 255)]
    for case in cases:
        for place in range(format.nbytes):
            case[:, place] = np.arange(256)
            np.testing.assert_array_equal(dequantise(format, case), oracle(format, case), err_msg=f"byte {place}")
            case[:, place] = case[0, (place + 1) % format.nbytes]


@every
def test_rows_stay_apart(format: Format, rng: np.random.Generator) -> None:
    x = rng.normal(size=(7, 512)).astype(np.float32)
    raw = quantise(format, x)
    assert raw.shape == (7, format.row_bytes(512)) and raw.dtype == np.uint8
    for i in range(7):
        np.testing.assert_array_equal(quantise(format, x[i : i + 1])[0], raw[i])
        np.testing.assert_array_equal(dequantise(format, raw[i : i + 1])[0], dequantise(format, raw)[i])
    np.testing.assert_array_equal(dequantise(format, raw[::2]), dequantise(format, raw)[::2])  # not contiguous
    assert dequantise(format, raw[:0]).shape == (0, 512) and quantise(format, x[:0]).shape == (0, raw.shape[1])


def test_real_blocks(shared_data: Path) -> None:
    met = set()
    for path in sorted((shared_data / "models" / "babyllama361").glob("*.gguf")):
        file = GgufFile(path)
        for name, info in file.tensors.items():
            raw = file.raw(name)
            np.testing.assert_array_equal(dequantise(info.format, raw), oracle(info.format, raw), err_msg=name)
            met.add(info.format.name)
    assert met >= {"F32", "Q8_0"}


@pytest.mark.parametrize("format", [by_name("Q5_K")])
def test_memory_stays_bounded(format: Format) -> None:
    raw = np.zeros((64, format.row_bytes(1 << 17)), np.uint8)  # 8 million weights, 33 MB of float32
    tracemalloc.start()
    try:
        x = dequantise(format, raw)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes + (8 << 20)
        tracemalloc.reset_peak()
        quantise(format, x[:16])
        assert tracemalloc.get_traced_memory()[1] < x.nbytes + (16 << 20)
    finally:
        tracemalloc.stop()


# --- numbers to bytes


@pytest.mark.parametrize("format", [by_name(name) for name in ROUNDED])
@pytest.mark.parametrize("spread", [1e-6, 0.02, 100.0])
def test_formats_that_only_round_give_the_same_bytes(format: Format, spread: float, rng: np.random.Generator) -> None:
    x = (rng.standard_t(3, size=(32, 256)) * spread).astype(np.float32)
    x[3] = 0
    x[4, :32] = np.arange(-16, 16) / 2  # halves, of which rounding must be the definition's
    theirs = gguf.quants.quantize(x, GgmlType[format.name]).view(np.uint8)
    np.testing.assert_array_equal(quantise(format, x), theirs)


def test_mxfp4_is_at_least_as_near_as_the_gguf_package(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(64, 1024)) * 0.03).astype(np.float32)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, GgmlType.MXFP4), GgmlType.MXFP4)
    ours = dequantise(FORMATS["MXFP4"], quantise(FORMATS["MXFP4"], x))
    errors = [np.square(y - x, dtype=np.float64).reshape(-1, 32).sum(1) for y in (ours, theirs)]
    assert (errors[0] <= errors[1] * 1.000001).all() and errors[0].sum() < 0.97 * errors[1].sum()


def naive(x: np.ndarray, group: int, low: int, high: int, *, symmetric: bool) -> float:
    """The error when each group's extremes give its scale, which is kept in full precision."""
    g = x.reshape(-1, group).astype(np.float64)
    if symmetric:
        extreme = np.take_along_axis(g, np.abs(g).argmax(1, keepdims=True), 1)
        step, offset = extreme / low, 0.0
    else:
        offset = g.min(1, keepdims=True)
        step = (g.max(1, keepdims=True) - offset) / (high - low)
    y = np.clip(np.rint((g - offset) / step), low, high) * step + offset
    return float(np.sqrt(np.mean((y - g) ** 2) / np.mean(g**2)))


@pytest.mark.parametrize("format", [by_name(name) for name in SEARCHED])
def test_the_search_beats_scales_from_the_extremes(format: Format, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(64, 1024)) * 0.02).astype(np.float32)
    found = error(x, format)
    assert found < SEARCHED[format.name]
    group, low, high, symmetric = {
        "Q2_K": (16, 0, 3, False), "Q3_K": (16, -4, 3, True), "Q4_K": (32, 0, 15, False), "Q5_K": (32, 0, 31, False),
        "Q6_K": (16, -32, 31, True), "IQ4_NL": (32, -8, 7, True), "IQ4_XS": (32, -8, 7, True),
    }[format.name]  # fmt: skip
    assert found < 0.95 * naive(x, group, low, high, symmetric=symmetric)
    # Heavy tails are what a search is for.
    tailed = (rng.standard_t(4, size=(64, 1024)) * 0.02).astype(np.float32)
    assert error(tailed, format) < 0.97 * naive(tailed, group, low, high, symmetric=symmetric)


@every_quantised
def test_no_weight_is_further_off_than_the_steps_allow(format: Format, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(32, 512)) * np.exp(rng.normal(size=(32, 1)))).astype(np.float32)
    off = np.abs(dequantise(format, quantise(format, x)) - x).reshape(-1, min(format.block, 32)).max(1)
    span = np.abs(x).reshape(-1, min(format.block, 32)).max(1)
    # The widest gap between neighbours, of 2 * span; a search may clip by as much again.
    levels = {"Q8_0": 254, "Q5_0": 31, "Q5_1": 31, "Q5_K": 31, "Q6_K": 63, "Q3_K": 7, "Q2_K": 3, "MXFP4": 6}
    assert (off <= 2.1 * span / levels.get(format.name, 10)).all()


@every_quantised
def test_quantising_what_was_quantised_loses_little(format: Format, rng: np.random.Generator) -> None:
    once = dequantise(format, quantise(format, rng.normal(size=(16, 512)).astype(np.float32)))
    assert error(once, format) < (0.12 if format.name == "Q2_K" else 0.03)


@every_quantised
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_scale_does_not_matter(format: Format, scale: float, rng: np.random.Generator) -> None:
    x = rng.normal(size=(16, 512)).astype(np.float32)
    assert error(x * np.float32(scale), format) == pytest.approx(error(x, format), rel=0.1)


# --- the numbers that break things


@every
def test_zeros_stay_zeros(format: Format) -> None:
    x = np.zeros((3, 512), np.float32)
    np.testing.assert_array_equal(dequantise(format, quantise(format, x)), x)
    np.testing.assert_array_equal(dequantise(format, quantise(format, -x)), x)


@every
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -0.37, 1000.0])
def test_constant_rows(format: Format, value: float) -> None:
    y = dequantise(format, quantise(format, np.full((2, 512), value, np.float32)))
    worst = {"MXFP4": 0.15, "BF16": 0.004, "Q8_0": 0.01}.get(format.name, 0.002)
    np.testing.assert_allclose(y, value, rtol=worst)


@every_quantised
@pytest.mark.parametrize("sign", [1, -1])
def test_one_outlier_costs_its_own_block_only(format: Format, sign: int, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(1, 1024)) * 0.02).astype(np.float32)
    calm = dequantise(format, quantise(format, x))
    x[0, 300] = sign * 1000
    y = dequantise(format, quantise(format, x))
    assert y[0, 300] == pytest.approx(sign * 1000, rel=0.35 if format.name == "MXFP4" else 0.02)
    begin = 300 // format.block * format.block
    outside = np.ones(1024, bool)
    outside[begin : begin + format.block] = False
    np.testing.assert_array_equal(y[0, outside], calm[0, outside])
    assert np.abs(y[0, ~outside]).max() < 1030


@every
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-12, 1e-8, 1e-7])
def test_tiny_numbers_are_kept_or_vanish(format: Format, size: float, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 512)).astype(np.float32) * np.float32(size)
    y = dequantise(format, quantise(format, x))
    assert np.isfinite(y).all() and np.abs(y).max() <= 4 * np.abs(x).max() + 1e-45


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_names_its_row(format: Format, bad: float) -> None:
    x = np.ones((400, 512), np.float32)
    x[399, 17] = bad
    with pytest.raises(ValueError, match=rf"row 399 holds {bad}, which {format.name} cannot store"):
        quantise(format, x)


@pytest.mark.parametrize("format", [by_name(name) for name in FORMATS if name not in ("F32", "MXFP4")])
def test_a_number_beyond_the_range_names_its_row(format: Format) -> None:
    x = np.ones((400, 512), np.float32)
    for huge in (3.4e38, -3.4e38):
        x[390, 3] = huge
        with pytest.raises(ValueError, match=f"row 390 holds numbers too large for {format.name}"):
            quantise(format, x)


def test_mxfp4_reaches_the_ends_of_float32() -> None:
    x = np.full((2, 32), 3e38, np.float32)
    x[1] = 1e-38
    np.testing.assert_allclose(dequantise(FORMATS["MXFP4"], quantise(FORMATS["MXFP4"], x)), x, rtol=0.3)
