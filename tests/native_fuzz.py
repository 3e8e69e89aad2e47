"""Random calls of the C++ kernels of one library, good ones and bad ones; prints digests of all results.

One is of the products with weights of bfloat16, which processors that multiply such numbers round in an order of their
own, and one of those with IN_STRETCHES, for which a library for tile registers rounds rows otherwise.

    python native_fuzz.py LIBRARY SEED CASES [CPU]

With CPU it stays on that one processor, so that XLA's pool has one thread.
Imports JAX and no engine, so that it runs under a sanitizer in a process of its own.
"""

import ctypes
import hashlib
import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from cache_layout import kept_by, rows_of

from jaxserve.formats import FORMATS, dequantise, quantise
from jaxserve.native import build

ATTENTION, LINEAR, EMBED = "jaxserve_ragged_paged_attention", "jaxserve_linear", "jaxserve_embed"
LINEAR_BLOCKS, EMBED_BLOCKS = "jaxserve_linear_blocks", "jaxserve_embed_blocks"
GROUPED, GROUPED_BLOCKS = "jaxserve_grouped_linear", "jaxserve_grouped_linear_blocks"
SAMPLE, LOGPROBS, ROTATE = "jaxserve_sample", "jaxserve_token_logprobs", "jaxserve_rotate"
BY_HEAD = "jaxserve_by_head"

IN_STRETCHES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Formats of csrc/stretch_products.h, where there are tiles."""


def random_case(rng):
    """A step of a few sequences of random lengths in random pages; unwritten memory is NaN.

    Returns arrays, lengths and tables, attributes, and how many tokens there are.
    """
    kv_heads, group = int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 3, 7, 8]))
    latent = rng.random() < 0.2
    kv_heads, group = (1, 3 * group) if latent else (kv_heads, group)
    head_dim = int(rng.choice([1, 8, 12, 16, 32, 40, 64, 80, 128]))
    page = int(rng.choice([1, 4, 16, 48]))
    pages = 1100 // page + 8
    seqs = int(rng.integers(1, 6))
    decodes = int(rng.integers(0, seqs + 1))
    q_lens = [1] * decodes + [int(rng.integers(0, 90)) for _ in range(seqs - decodes)]
    lens = [n + int(rng.integers(0, 120)) for n in q_lens]
    rows = seqs + int(rng.integers(0, 3))
    width = -(-max(1, *lens) // page) + 1
    free = iter(rng.permutation(pages))
    table = rng.integers(-5, pages + 5, (rows, width)).astype(np.int32)  # what lies past a sequence is never looked at
    width = head_dim + int(rng.integers(0, 5)) if latent else kv_heads * 2 * head_dim
    cache = np.full((pages, page, width), np.nan, np.float32)
    for s, length in enumerate(lens):
        for i in range(-(-length // page)):
            table[s, i] = next(free)
        for i in range(length - q_lens[s]):
            cache[table[s, i // page], i % page] = rng.normal(size=cache.shape[2])
    cache = cache if latent else kept_by("cpu", cache, kv_heads)
    tokens = max(1, sum(q_lens) + int(rng.integers(0, 5)))
    cu = np.full(rows + 1, sum(q_lens), np.int32)
    cu[: seqs + 1] = np.concatenate([[0], np.cumsum(q_lens)])
    q = rng.normal(size=(tokens, kv_heads * group, head_dim))
    k, v = rng.normal(size=(2, tokens, kv_heads, head_dim))
    kv_lens = np.array([*lens, *[0] * (rows - seqs)], np.int32)
    first_page = np.int32(rng.integers(0, 4))
    step = dict(
        kv_lens=kv_lens,
        page_table=table - first_page,
        first_page=np.asarray(first_page),
        cu_q_lens=cu,
        distribution=np.array([decodes, decodes, seqs], np.int32),
    )
    compute = rng.choice(["float32", "bfloat16"])
    held = rng.choice(["float32", "bfloat16", "float16", "int8"][: 3 if latent else 4])
    scales = np.zeros(0, np.float32)
    if held == "int8":  # its unwritten memory is in the scales
        unwritten = np.isnan(rows_of("cpu", cache, kv_heads).reshape(pages, page, kv_heads * 2, -1)[..., 0])
        scales = np.where(unwritten, np.nan, 0.02).transpose(0, 2, 1).astype(np.float32)
        cache = rng.integers(-128, 128, cache.shape)
    if latent:
        v = np.zeros((0, 0, 0))
    data = [jnp.asarray(a, compute) for a in (q, k, v)] + [jnp.asarray(cache, held), jnp.asarray(scales)]
    step["sinks"] = rng.normal(size=int(rng.choice([0, kv_heads * group]))).astype(np.float32)  # often none
    window, soft_cap = np.int64(rng.choice([0, 0, 1, 5, 70])), np.float32(rng.choice([0, 0, 0.5, 50]))
    causal = bool(window or rng.random() < 0.7)
    attributes = {"scale": np.float32(0.3), "window": window, "soft_cap": soft_cap, "causal": causal}
    attributes["value_dim"] = np.int64(rng.integers(1, head_dim + 1) if latent else 0)
    return data, step, attributes, sum(q_lens)


def attend(q, k, v, cache, scales, *step, **attributes):
    """The step's result, and the cache's values and scales; none of these where they are an empty array."""
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, cache, scales)]
    if value_dim := int(attributes["value_dim"]):
        results[0] = jax.ShapeDtypeStruct((*q.shape[:2], value_dim), q.dtype)
    aliases = {3: 1, 4: 2} if scales.size else {3: 1}
    call = jax.ffi.ffi_call(ATTENTION, results, input_output_aliases=aliases)
    return call(q, k, v, cache, scales, *step, **attributes)


def random_product(rng):
    """x [T, K], w [N, K] and the result's type."""
    tokens, depth, outputs = (int(rng.choice(sizes)) for sizes in (
        [1, 2, 3, 4, 5, 33, 130], [1, 15, 16, 100, 256, 512, 513, 1500], [1, 3, 16, 31, 32, 70]
    ))  # fmt: skip
    x = jnp.asarray(rng.normal(size=(tokens, depth)), rng.choice(["float32", "bfloat16"]))
    w = jnp.asarray(rng.normal(size=(outputs, depth)), rng.choice(["float32", "bfloat16", "float16"]))
    return x, w, str(rng.choice(["float32", "bfloat16"]))


GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
TILE, PAIR = 32, 2  # steps of k


def steps_together(library):
    """Steps of k that it takes at once of weights of bfloat16: a tile's, a pair's, or 1."""
    return library.jaxserve_panel_depth(ctypes.c_int64(30), ctypes.c_int64(1))


def packed(library, w):
    """w [N, K] as the library lays it out: panels [N / 16, K, 16], zeros after the last row; or bfloat16 in pairs."""
    rows = np.asarray(w)
    (outputs, depth), code = rows.shape, GGML_TYPES[rows.dtype.name]
    wide = library.jaxserve_panel_depth(ctypes.c_int64(code), ctypes.c_int64(depth))
    panels = np.full((-(-outputs // 16), wide, 16), 7, rows.dtype)
    library.jaxserve_pack(
        ctypes.c_void_p(rows.ctypes.data),
        *(ctypes.c_int64(n) for n in (outputs, depth, code)),
        ctypes.c_void_p(panels.ctypes.data),
    )
    want = np.zeros((panels.shape[0] * 16, wide), rows.dtype)
    want[:outputs, :depth] = rows
    if code == 30 and steps_together(library) > 1:  # [N / 16, K / 2, 16, 2]
        found = panels.reshape(len(panels), -1, 16, 2).transpose(0, 2, 1, 3)
    else:
        found = panels.transpose(0, 2, 1)
    assert (found.reshape(want.shape) == want).all(), "a packed weight is another weight"
    return jnp.asarray(panels)


def on_tiles(x, w):
    """x [T, K] times bfloat16 w [N, K] -> float32 [T, N] with every rounding of the tile registers.

    Intel's Architecture Instruction Set Extensions reference, TDPBF16PS: of a tile's 16 pairs of k the first numbers
    and the second ones are summed apart, each product fused with its sum; then both sums together are added.
    """
    x, w = np.asarray(x), np.asarray(w, np.float64)
    parts = [x]
    if x.dtype == np.float32:
        nearest = x.astype(jnp.bfloat16)
        parts = [nearest, (x - nearest.astype(np.float32)).astype(jnp.bfloat16)]
    total = np.zeros((len(x), len(w)), np.float32)
    for part in parts:
        part, sums = part.astype(np.float64), np.zeros_like(total)
        for start in range(0, x.shape[1], TILE):
            halves = np.zeros((2, *total.shape), np.float32)
            for k in range(start, min(start + TILE, x.shape[1])):
                halves[k % 2] = halves[k % 2] + part[:, k : k + 1] * w[:, k]  # in float64, then rounded
            sums += halves[0] + halves[1]
        total += sums
    return total


def in_pairs(x, w):
    """x [T, K] times bfloat16 w [N, K] -> float32 [T, N] with every rounding of vectors that multiply pairs.

    Intel's Architecture Instruction Set Extensions reference, VDPBF16PS: the second product of a pair is fused with the
    sum, then the first.
    """
    x, w = np.asarray(x).astype(jnp.bfloat16).astype(np.float64), np.asarray(w, np.float64)
    total = np.zeros((len(x), len(w)), np.float32)
    for start in range(0, x.shape[1], PAIR):
        for k in reversed(range(start, min(start + PAIR, x.shape[1]))):
            total = (total + x[:, k : k + 1] * w[:, k]).astype(np.float32)  # in float64, then rounded
    return total


def grouped(rng, digest, target, x, matrices, single, **attributes):
    """Rows of x by the matrix of their group, each with the bits of `single(row, matrix)`; bad calls refused.

    `matrices` [E, ...] are packed, all of one shape.
    """
    count, name = len(matrices), target.removeprefix("jaxserve_")
    chosen = np.sort(rng.choice(rng.permutation(count)[: rng.integers(1, count + 1)], len(x)))  # some have no rows
    sizes = np.bincount(chosen, minlength=count).astype(np.int32)
    outputs = single(x[:1], matrices[0]).shape[1]
    x = jnp.where(rng.random((len(x), 1)) < 0.8, x, 0)  # rows of zeros at the end of a group are left out

    def product(x, matrices, sizes, **changes):
        shape = jax.ShapeDtypeStruct((len(x), outputs), "float32")
        return jax.ffi.ffi_call(target, shape)(x, matrices, sizes, **attributes | changes)

    y = np.asarray(product(x, matrices, sizes))
    for i, expert in enumerate(chosen):
        assert np.asarray(single(x[i : i + 1], matrices[expert])).tobytes() == y[i].tobytes(), (name, sizes, i)
    digest.update(y.tobytes())
    spoilt, i = sizes.copy(), rng.integers(0, count)
    spoilt[i] += rng.choice([-1, 1, 2**31 - 1 - len(x), -(2**31) + len(x)])
    negative = np.array([len(x) + 1, -1, *[0] * (count - 1)], np.int32)[:count]
    refused = 0
    for wrong in (
        lambda: product(x, matrices, spoilt),
        lambda: product(x, matrices, negative),
        lambda: product(x, matrices, np.append(sizes, np.int32(0))),
        lambda: product(x, matrices, sizes[None]),
        lambda: product(x, matrices, sizes.astype(np.float32)),
        lambda: product(jnp.pad(x, ((0, 0), (0, TILE))), matrices, sizes),
        lambda: product(x, matrices[0], sizes) if count > 1 else product(x[0], matrices, sizes),
    ):
        try:
            jax.block_until_ready(wrong())
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert f"{name}: " in str(error) or "buffer dtype" in str(error), error
            refused += 1
    assert refused == 7
    return refused


def table_rows(w, ids):
    """Those of ids past the end are the last one, those of ids below 0 zeros."""
    return np.where(ids[:, None] < 0, 0, w[ids.clip(0, len(w) - 1)])


def quantised_product(library, rng, digest, in_stretches):
    """Products with a quantised weight against its dequantised floats, and the rows of its table; bad calls refused."""
    format = rng.choice([f for f in FORMATS.values() if f.quantised])
    if format.name in IN_STRETCHES:
        digest = in_stretches
    depths = [32, 160, 256, 768] if format.block == 32 else [256, 768]
    tokens, depth, outputs = (int(rng.choice(sizes)) for sizes in ([1, 2, 5, 9, 20, 70], depths, [1, 16, 37]))
    x = rng.normal(size=(tokens, depth)).astype(np.float32)
    rows = quantise(format, rng.normal(size=(outputs, depth)).astype(np.float32))
    w, code, sizes = dequantise(format, rows), np.int64(format.code), (outputs, depth)
    library.jaxserve_panels_size.restype = ctypes.c_int64
    size = library.jaxserve_panels_size(*(ctypes.c_int64(n) for n in (code, *sizes)))
    panels = np.full(size, 7, np.uint8)
    library.jaxserve_pack_blocks(
        ctypes.c_int64(code),
        ctypes.c_void_p(rows.ctypes.data),
        *(ctypes.c_int64(n) for n in (*sizes, rows.shape[1])),
        ctypes.c_void_p(panels.ctypes.data),
    )
    panels = jnp.asarray(panels)

    def product(x, panels, format):
        result = jax.ShapeDtypeStruct((len(x), outputs), "float32")
        return jax.ffi.ffi_call(LINEAR_BLOCKS, result)(x, panels, format=format)

    def gather(panels, ids, outputs):
        result = jax.ShapeDtypeStruct((len(ids), depth), "float32")
        return jax.ffi.ffi_call(EMBED_BLOCKS, result)(panels, ids, format=code, outputs=np.int64(outputs))

    y = np.asarray(product(x, panels, code))
    # What rounding x to 127 steps of each 32's largest, or each 128's, leaves: at most half a step, mostly far less.
    under_one = library.jaxserve_steps_of_a_scale(ctypes.c_int64(format.code))
    parts = x.reshape(tokens, -1, under_one)
    steps = np.abs(parts).max(axis=2, keepdims=True) / 127
    rounded = (np.round(parts / steps) * steps).reshape(x.shape)
    want = rounded.astype(np.float64) @ w.T.astype(np.float64)
    near = np.abs(x).max() / 127 * np.abs(w).max()  # a tie may round the other way
    error = np.abs(y - want).max()
    assert error < 1e-5 * np.abs(want).max() + 2 * near, (format.name, x.shape, outputs, error)
    assert np.asarray(product(x[-1:], panels, code)).tobytes() == y[-1:].tobytes(), "a row depends on its neighbours"
    ids = rng.integers(-2, outputs + 2, 20).astype(np.int32)
    assert (np.asarray(gather(panels, ids, outputs)) == table_rows(w, ids)).all(), format.name
    digest.update(y.tobytes())
    # Any order of the panels' first bytes, which are codes, is another matrix.
    matrices = jnp.stack([jnp.concatenate([jnp.roll(panels[:256], 64 * e), panels[256:]]) for e in range(3)])
    single = partial(product, format=code)
    refused = grouped(rng, digest, GROUPED_BLOCKS, jnp.asarray(x), matrices, single, format=code)
    for wrong in (
        lambda: product(x, panels[:-1], code),
        lambda: product(x, panels, np.int64(rng.choice([-1, 0, 5, 99]))),
        lambda: product(x[:, :-1], panels, code),
        lambda: gather(panels, ids, rng.choice([0, -1, 10_000])),
    ):
        try:
            jax.block_until_ready(wrong())
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert "linear_blocks: " in str(error) or "embed_blocks: " in str(error), error
            refused += 1
    return refused


def sampled(rng, digest):
    """Random rows of logits, greedy and drawn, and their log-probabilities, against numpy; bad calls refused."""
    rows, vocab = int(rng.choice([1, 2, 7])), int(rng.choice([1, 15, 16, 33, 1000, 2048, 20_011]))
    logits = (rng.normal(size=(rows, vocab)) * rng.choice([0.1, 1, 10])).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)
    logits[rng.random((rows, vocab)) < rng.choice([0, 0.5])] = -np.inf
    wild = rng.choice([0, 0, 0, np.inf, np.nan])
    if wild != 0:
        logits[0, rng.integers(0, vocab)] = wild
    temperature, top_p, min_p = (
        rng.choice(values, rows).astype(np.float32)
        for values in ([0, 1e-3, 0.7, 1, 100], [1, 1, 1e-6, 0.5, 0.95], [0, 0, 0.05, 1])
    )
    top_k = rng.choice([-1, 0, 1, 2, 50, vocab - 1, vocab, 2**31 - 1], rows).astype(np.int32)
    seed, position = rng.integers(0, 2**32, (rows, 2), np.uint32), rng.integers(0, 10**6, rows).astype(np.int32)
    parameters = [temperature, top_k, top_p, min_p, seed, position]

    def sample(logits, *parameters):
        return jax.ffi.ffi_call(SAMPLE, jax.ShapeDtypeStruct((len(logits),), "int32"))(logits, *parameters)

    def logprobs(logits, tokens, top):
        shapes = [((len(logits), *wide), kind) for wide in ((), (top,)) for kind in ("float32", "int32")]
        results = [jax.ShapeDtypeStruct(*shapes[i]) for i in (0, 1, 3, 2)]
        return jax.ffi.ffi_call(LOGPROBS, results)(logits, tokens)

    tokens = np.asarray(sample(logits, *parameters))
    alone = sample(logits[-1:], *(a[-1:] for a in parameters))
    assert alone[0] == tokens[-1], "a row depends on its neighbours"
    for i, token in enumerate(tokens):
        if temperature[i] == 0 or top_k[i] == 1 or not np.isfinite(logits[i]).any():
            best = logits[i].argmax()
            assert token == best or (temperature[i] > 0 and logits[i, token] == logits[i, best]), (i, token, best)
        elif np.isfinite(logits[i].max()):
            better = (logits[i] > logits[i, token]).sum()
            assert logits[i, token] > -np.inf and better < (top_k[i] if top_k[i] > 0 else vocab)
    top = min(vocab, int(rng.choice([0, 1, 20])))
    wanted = np.where(rng.random(rows) < 0.2, -1, rng.integers(0, vocab, rows)).astype(np.int32)
    found = [np.asarray(a) for a in logprobs(logits, wanted, top)]
    for i, token in enumerate(wanted):
        if token < 0:
            assert all((a[i] == 0).all() for a in found)
        elif np.isfinite(logits[i].max()):
            x = logits[i].astype(np.float64) - logits[i].max()
            with np.errstate(divide="ignore"):
                x -= np.log(np.exp(x).sum())
            order = np.argsort(-x, kind="stable")[:top]
            assert found[1][i] == 1 + (x > x[token]).sum() and (found[2][i] == order).all()
            np.testing.assert_allclose(found[0][i], x[token], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(found[3][i], x[order], atol=1e-5, rtol=1e-5)
    for a in (tokens, *found):
        digest.update(a.tobytes())
    refused = 0
    for wrong in (
        lambda: sample(logits, *parameters[:4], seed[:, :1], position),
        lambda: sample(logits, np.full(rows, np.inf, np.float32), *parameters[1:]),
        lambda: sample(logits, *(a[:-1] for a in parameters)),
        lambda: sample(logits[:, :0], *parameters),
        lambda: sample(logits[0], *parameters),
        lambda: logprobs(logits, np.full(rows, rng.choice([-2, vocab, 2**31 - 1]), np.int32), top),
        lambda: logprobs(logits, wanted, vocab + 1),
        lambda: logprobs(logits, wanted[:-1], top),
    ):
        try:
            jax.block_until_ready(wrong())
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert "sample: " in str(error) or "token_logprobs: " in str(error), error
            refused += 1
    assert refused == 8
    return refused


def rotated(rng, digest):
    """Heads turned by angles, against numpy; bad calls refused."""
    tokens, heads, half = (int(rng.choice(sizes)) for sizes in ([1, 3, 700], [1, 5], [1, 8, 37, 64]))
    x = jnp.asarray(
        rng.normal(size=(tokens, heads, 2 * half + int(rng.choice([0, 0, 3])))), rng.choice(["float32", "bfloat16"])
    )
    angles = rng.uniform(-9, 9, (tokens, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rotate(x, cos, sin, like=x):
        return jax.ffi.ffi_call(ROTATE, jax.ShapeDtypeStruct(like.shape, like.dtype))(x, cos, sin)

    a, b, rest = np.split(np.asarray(x, np.float64), (half, 2 * half), axis=-1)
    want = np.concatenate([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None], rest], axis=-1)
    y = np.asarray(rotate(x, cos, sin))
    np.testing.assert_allclose(y.astype(np.float64), want, atol=1e-5 if x.dtype == jnp.float32 else 3e-2)
    assert np.asarray(rotate(x[-1:], cos[-1:], sin[-1:], x[-1:])).tobytes() == y[-1:].tobytes()
    digest.update(y.tobytes())
    refused = 0
    for wrong in (
        lambda: rotate(x, cos[:-1], sin[:-1]),
        lambda: rotate(x, cos, sin[:, :-1]),
        lambda: rotate(x[:, 0], cos, sin),
        lambda: rotate(x, *(np.zeros((tokens, x.shape[2] // 2 + 1), np.float32),) * 2),
        lambda: rotate(x.astype(jnp.float16), cos, sin),
        lambda: rotate(x, cos, sin, x[..., :-1]),
    ):
        try:
            jax.block_until_ready(wrong())
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert "rotate: " in str(error), error
            refused += 1
    assert refused == 6
    return refused


def spoil(rng, step, pages):
    """One lie in what only the device knows."""
    step, seqs = {name: array.copy() for name, array in step.items()}, step["distribution"][2]
    which = int(rng.integers(0, 7))
    if which == 0:
        step["distribution"][2] = rng.choice([-1, len(step["kv_lens"]) + 1, 2**31 - 1])
    elif which == 1:
        step["kv_lens"][rng.integers(0, seqs)] = rng.choice([-(2**31), 2**31 - 1])
    elif which == 2:
        step["cu_q_lens"][rng.integers(0, seqs + 1)] = rng.choice([-7, 2**31 - 1])
    elif which == 3:
        step["kv_lens"][0] = max(1, step["kv_lens"][0])
        step["page_table"][0, 0] = rng.choice([-1 - step["first_page"], pages, 2**31 - 1, -(2**31)])
    elif which == 4:
        step["kv_lens"][0] = step["cu_q_lens"][1] - 1
    elif which == 5:
        step["kv_lens"][0] = max(1, step["kv_lens"][0])
        step["first_page"][...] = rng.choice([2**31 - 1, -(2**31)])
    else:
        step["kv_lens"][0] = step["page_table"].shape[1] * 48 + 1
    return step


def misfit(rng, heads, scales):
    """An array or an attribute that is wrong in any step."""
    wrong = [(0, 4), (1, 4, 16), (4096,)] if scales.size else [(1,), (1, 4, 16)]
    return [
        ({"scales": np.zeros(wrong[rng.integers(0, len(wrong))], np.float32)}, {}),
        ({"first_page": np.zeros(2, np.int32)}, {}),
        ({"sinks": np.zeros(heads + 1, np.float32)}, {}),
        ({"sinks": np.zeros((1, heads), np.float32)}, {}),
        ({"sinks": np.zeros(heads, np.float16)}, {}),
        ({}, {"soft_cap": np.float32(rng.choice([-1, np.inf, np.nan]))}),
        ({}, {"window": np.int64(-1)}),
        ({}, {"window": np.int64(3), "causal": False}),
        ({}, {"value_dim": np.int64(1000)}),
    ][rng.integers(0, 9)]


def multiplied_by_head(rng, digest):
    """Each head's numbers times rows of a matrix of its own, either way, against numpy; bad calls refused."""
    tokens, heads, rows, rank = (int(rng.choice(sizes)) for sizes in (
        [1, 3, 48, 130], [1, 5], [1, 8, 24, 33], [1, 16, 40, 65]
    ))  # fmt: skip
    first, more, transposed = int(rng.integers(0, 4)), int(rng.integers(0, 4)), bool(rng.random() < 0.5)
    w = jnp.asarray(rng.normal(size=(heads, first + rows + more, rank)), rng.choice(["float32", "bfloat16"]))
    inputs, outputs = (rank, rows) if transposed else (rows, rank)
    x = jnp.asarray(rng.normal(size=(tokens, heads, inputs)), rng.choice(["float32", "bfloat16"]))

    def multiply(x, w=w, first=first, outputs=outputs, transposed=transposed):
        result = jax.ShapeDtypeStruct((*x.shape[:-1], outputs), x.dtype)
        return jax.ffi.ffi_call(BY_HEAD, result)(x, w, first=np.int64(first), transposed=transposed)

    used = np.asarray(w, np.float64)[:, first : first + rows]
    want = np.einsum("tnr,nir->tni" if transposed else "tni,nir->tnr", np.asarray(x, np.float64), used)
    y = np.asarray(multiply(x))
    np.testing.assert_allclose(y.astype(np.float64), want, atol=(1e-4 if x.dtype == jnp.float32 else 0.2), rtol=1e-2)
    assert np.asarray(multiply(x[-1:])).tobytes() == y[-1:].tobytes(), "a token depends on its neighbours"
    digest.update(y.tobytes())
    refused = 0
    for wrong in (
        lambda: multiply(x, first=-1),
        lambda: multiply(x, first=first + more + 1),
        lambda: multiply(x, w[..., :-1] if rank > 1 else w[:0]),
        lambda: multiply(x, w[0]),
        lambda: multiply(x, jnp.concatenate([w, w])),
        lambda: multiply(x, outputs=outputs + 4),
        lambda: multiply(x.astype(jnp.float16)),
        lambda: multiply(x, w.astype(jnp.float16)),
    ):
        try:
            jax.block_until_ready(wrong())
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert "by_head: " in str(error), error
            refused += 1
    assert refused == 8
    return refused


def main() -> None:
    library, seed, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        os.sched_setaffinity(0, {int(sys.argv[4])})  # before JAX looks how many there are
    build.best_isa()  # asks for what the best instruction set needs
    handlers = ctypes.CDLL(library)
    for target in (
        ATTENTION,
        LINEAR,
        EMBED,
        GROUPED,
        LINEAR_BLOCKS,
        EMBED_BLOCKS,
        GROUPED_BLOCKS,
        SAMPLE,
        LOGPROBS,
        ROTATE,
        BY_HEAD,
    ):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(handlers, target)), platform="cpu")
    digest, with_bf16, in_stretches = (hashlib.blake2b(digest_size=16) for _ in range(3))
    refused = 0
    for case in range(cases):
        rng = np.random.default_rng([seed, case])
        (q, k, v, cache, scales), step, attributes, used = random_case(rng)
        call = jax.jit(partial(attend, **attributes))
        out, *kept = call(q, k, v, cache, scales, *step.values())
        assert np.isfinite(np.asarray(out, np.float32)).all(), "unwritten memory was used"
        for a in (out, *kept):
            digest.update(np.asarray(a).tobytes())
        if used:
            try:
                jax.block_until_ready(call(q, k, v, cache, scales, *spoil(rng, step, cache.shape[0]).values()))
            except (ValueError, jax.errors.JaxRuntimeError) as error:  # raised at once, or when it was waited for
                assert "ragged_paged_attention: " in str(error), error
                refused += 1
        arrays, others = misfit(rng, q.shape[1], scales)
        try:
            arguments = {"scales": scales} | step | arrays
            jax.block_until_ready(attend(q, k, v, cache, *arguments.values(), **attributes | others))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert "ragged_paged_attention: " in str(error) or "buffer dtype" in str(error), error
            refused += 1
        else:
            raise AssertionError(f"{arrays or others} was taken")
        x, w, dtype = random_product(rng)
        panels = packed(handlers, w)
        product = jax.ffi.ffi_call(LINEAR, jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), dtype))
        y = np.asarray(product(x, panels))
        together = steps_together(handlers) if w.dtype == jnp.bfloat16 else 1
        multiplied = x.astype(jnp.bfloat16) if together == PAIR else x
        want = np.asarray(multiplied, np.float64) @ np.asarray(w, np.float64).T
        error = np.abs(y.astype(np.float64) - want).max() / np.abs(want).max()
        assert error < (1e-5 if dtype == "float32" else 1e-2), (x.shape, w.shape, dtype, error)
        alone = jax.ffi.ffi_call(LINEAR, jax.ShapeDtypeStruct((1, w.shape[0]), dtype))(x[-1:], panels)
        assert np.asarray(alone).tobytes() == y[-1:].tobytes(), "a row depends on its neighbours"
        if together > 1:
            rounded = on_tiles(x, w) if together == TILE else in_pairs(x, w)
            assert y.tobytes() == rounded.astype(y.dtype).tobytes(), (x.shape, x.dtype, w.shape, dtype)
        of_products = with_bf16 if w.dtype == jnp.bfloat16 else digest
        of_products.update(y.tobytes())
        single = jax.ffi.ffi_call(LINEAR, jax.ShapeDtypeStruct((1, w.shape[0]), "float32"))
        matrices = jnp.stack([jnp.roll(panels, e, axis=1) for e in range(rng.integers(1, 6))])
        refused += grouped(rng, of_products, GROUPED, x, matrices, single)
        ids = rng.integers(-2, w.shape[0] + 2, 5).astype(np.int32)
        gather = jax.ffi.ffi_call(EMBED, jax.ShapeDtypeStruct((5, w.shape[1]), "float32"))
        rows = gather(panels, ids, outputs=np.int64(w.shape[0]))
        assert (np.asarray(rows) == table_rows(np.asarray(w, np.float32), ids)).all()
        twice, outside = jnp.concatenate([panels, panels], axis=rng.integers(0, 3)), rng.choice([0, -1, 10_000])
        for wrong, arguments in ((product, (x, twice)), (partial(gather, outputs=np.int64(outside)), (panels, ids))):
            try:
                jax.block_until_ready(wrong(*arguments))
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                assert "linear: " in str(error) or "embed: " in str(error), error
                refused += 1
        refused += quantised_product(handlers, rng, digest, in_stretches) + sampled(rng, digest)
        refused += rotated(rng, digest) + multiplied_by_head(rng, digest)
    print(digest.hexdigest(), with_bf16.hexdigest(), in_stretches.hexdigest(), refused)


if __name__ == "__main__":
    main()
