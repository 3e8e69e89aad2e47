"""Times the C++ kernels for CPU beside XLA in one process, call by call in turn, and prints tables.

python tools/bench_kernels.py [--rounds 20] [--tables attention,products,quantised,grouped]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention, native, quant
from jaxserve.formats import FORMATS, Blocks, quantise
from jaxserve.native import blocks
from jaxserve.native.linear import linear, pack
from jaxserve.spec import CacheSpec

# sequences, context, query tokens each, heads, kv heads, head_dim, dtype
ATTENTION = [
    (32, 96, 1, 8, 4, 32, "float32"),
    (16, 512, 1, 16, 8, 128, "float32"),
    (16, 512, 1, 16, 8, 128, "bfloat16"),
    (1, 4096, 1, 16, 8, 128, "float32"),
    (1, 512, 512, 16, 8, 128, "float32"),
]
# the same, float32 queries and the types of cache to be compared
CACHES = [
    (seqs, context, 1, heads, kv_heads, head_dim, "float32")
    for seqs, context in ((16, 512), (1, 4096))
    for heads, kv_heads, head_dim in ((16, 8, 128), (32, 8, 64))
]
PRODUCTS = [(t, 2048, 2048, "float32") for t in (1, 4, 32, 256)] + [(t, 2048, 2048, "bfloat16") for t in (4, 32, 256)]
QUANTISED = [(name, t) for name in ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS") for t in (1, 16, 64)]
# Qwen3-30B-A3B's experts, of which each token goes through 8.
EXPERTS, USED, DEPTH, OUTPUTS = 128, 8, 2048, 768
GROUPED = [(name, t) for name in ("Q8_0", "Q4_0", "Q4_K") for t in (1, 16, 64)]
ROUTINGS = 6
PAGE = 16
WIDE = "{:<44} {:>9} {:>9} {:>7} {:>9} {:>10}"


def fastest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call's fastest round; the calls take turns, so that all meet the same machine."""
    best = dict.fromkeys(calls, float("inf"))
    for name, call in list(calls.items()) * (rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best[name] = min(best[name], 1000 * (time.perf_counter() - start))  # the first, which compiles, is never it
    return best


def attention_call(body: str, case: tuple, held: str | None = None) -> Callable[[], Any]:
    """`held`: the type of the cache, if not that of the queries."""
    seqs, context, queries, heads, kv_heads, head_dim, dtype = case
    kernel = attention.choose(body, "cpu")[2]
    width, rng = -(-context // PAGE), np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(seqs * queries, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads))
    shapes = attention.cache_shapes(CacheSpec(1, kv_heads, head_dim), seqs * width, PAGE, held or dtype)
    # Bytes up to 127 are numbers up to 1 with a scale of 0.01.
    size = {"int8": 127, "float32": 0.01 if held == "int8" else 1}
    cache = [jax.tree.map(lambda a: jnp.asarray(rng.uniform(0, size.get(a.dtype.name, 1), a.shape), a.dtype), shapes)]
    lens, table = jnp.full((seqs,), context, jnp.int32), jnp.arange(seqs * width, dtype=jnp.int32).reshape(seqs, -1)
    cu = jnp.arange(seqs + 1, dtype=jnp.int32) * queries
    singles = seqs if queries == 1 else 0
    distribution = jnp.asarray([singles, singles, seqs], jnp.int32)
    run = jax.jit(lambda *a: kernel(*a, lens, table, cu, distribution, scale=head_dim**-0.5), donate_argnums=3)

    def call() -> Any:
        out, cache[0] = run(q, k, v, cache[0])
        return out, cache[0]

    return call


def product_call(body: str, case: tuple) -> Callable[[], Any]:
    tokens, depth, outputs, dtype = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, depth)), dtype)
    weights = [jnp.asarray(rng.normal(size=(outputs, depth)), dtype) for _ in range(4)]  # more than a cache holds

    def xla(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(dtype)

    if body == "cpu":
        weights = [jnp.asarray(pack(np.asarray(w))) for w in weights]
    one = xla if body == "xla" else lambda x, w: linear(x, w, outputs, x.dtype)
    run = jax.jit(lambda x, weights: [one(x, w) for w in weights])
    return lambda: run(x, weights)


def quantised_call(name: str, tokens: int, depth: int = 2048, outputs: int = 8192) -> tuple[Callable[[], Any], int]:
    """A product with three weights in turn, and the bytes of one."""
    format, rng = FORMATS[name], np.random.default_rng(0)
    rows = quantise(format, rng.normal(size=(64, depth)).astype(np.float32))
    panels = blocks.pack(format, np.tile(rows, (outputs // 64, 1)), depth)
    x = jnp.asarray(rng.normal(size=(tokens, depth)).astype(np.float32))
    weights = [jnp.array(panels) for _ in range(3)]  # more than a cache holds
    run = jax.jit(lambda x, weights: [blocks.linear(x, w, format, outputs, x.dtype) for w in weights])
    return lambda: run(x, weights), panels.nbytes


def grouped_call(name: str | None, tokens: int) -> tuple[Callable[[], Any], float]:
    """Products of `tokens` tokens with random experts, ROUTINGS of them in turn, and the bytes that one has to read.

    Without a format's name: by XLA, of float32 weights, and one routing.
    """
    rng = np.random.default_rng(0)
    chosen = np.array([rng.permutation(EXPERTS)[:USED] for _ in range(ROUTINGS * tokens)]).reshape(ROUTINGS, -1)
    sizes = np.array([np.bincount(c, minlength=EXPERTS) for c in chosen], np.int32)
    x = jnp.asarray(rng.normal(size=(tokens * USED, DEPTH)).astype(np.float32))
    one = rng.normal(size=(64, DEPTH)).astype(np.float32)
    if name is None:
        sizes, w = sizes[:1], jnp.asarray(np.tile(one, (EXPERTS, OUTPUTS // 64, 1)))
        nbytes = w.nbytes
    else:
        rows = np.tile(quantise(FORMATS[name], one), (OUTPUTS // 64, 1))
        matrix = quant.pack(Blocks(FORMATS[name], rows), (OUTPUTS, DEPTH), np.float32)
        w = jax.tree.map(jnp.asarray, quant.stack([matrix] * EXPERTS, EXPERTS))
        nbytes = w.panels.nbytes
    run = jax.jit(lambda x, w, sizes: [quant.grouped_linear(x, w, s) for s in sizes])
    return lambda: run(x, w, sizes), nbytes / EXPERTS * (sizes > 0).sum(1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the C++ kernels for CPU beside XLA.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tables", default="attention,products,quantised,grouped", help="default: %(default)s")
    arguments = parser.parse_args()
    rounds, tables = arguments.rounds, arguments.tables.split(",")
    native.load(print)
    if "attention" in tables:
        attention_table(rounds)
    if "products" in tables:
        products_table(rounds)
    if "quantised" in tables:
        quantised_table(rounds)
    if "grouped" in tables:
        grouped_table(rounds)


def attention_table(rounds: int) -> None:
    row = WIDE
    print(row.format("attention: seqs x context, queries, heads", "XLA ms", "C++ ms", "ratio", "GB/s", "GFLOP/s"))
    for case in ATTENTION:
        seqs, context, queries, heads, kv_heads, head_dim, dtype = case
        ms = fastest({b: attention_call(b, case) for b in ("reference", "cpu")}, rounds)
        read = seqs * context * kv_heads * 2 * head_dim * jnp.dtype(dtype).itemsize
        work = 4 * seqs * queries * (context - (queries - 1) / 2) * heads * head_dim
        name = f"{seqs} x {context}, {queries}, {heads}/{kv_heads} of {head_dim}, {dtype}"
        figures = (
            ms["reference"],
            ms["cpu"],
            ms["reference"] / ms["cpu"],
            read / ms["cpu"] / 1e6,
            work / ms["cpu"] / 1e6,
        )
        print(row.format(name, *(f"{f:.2f}" for f in figures)), flush=True)
    wide = "{:<44} {:>11} {:>8} {:>6} {:>14}"
    print(wide.format("attention: one query a sequence, float32", "float16 ms", "int8 ms", "ratio", "int8 GB/s"))
    for case in CACHES:
        seqs, context, _, heads, kv_heads, head_dim, _ = case
        ms = fastest({held: attention_call("cpu", case, held) for held in ("float16", "int8")}, rounds)
        read = seqs * context * kv_heads * 2 * (head_dim + 4)
        name = f"{seqs} x {context}, {heads}/{kv_heads} of {head_dim}"
        figures = ms["float16"], ms["int8"], ms["float16"] / ms["int8"], read / ms["int8"] / 1e6
        print(wide.format(name, *(f"{f:.2f}" for f in figures)), flush=True)


def products_table(rounds: int) -> None:
    row = WIDE
    print(row.format("product: x [T, K], w [N, K]", "XLA ms", "C++ ms", "ratio", "GB/s", "GFLOP/s"))
    for product in PRODUCTS:
        tokens, depth, outputs, dtype = product
        ms = {b: m / 4 for b, m in fastest({b: product_call(b, product) for b in ("xla", "cpu")}, rounds).items()}
        read, work = depth * outputs * jnp.dtype(dtype).itemsize, 2 * tokens * depth * outputs
        name = f"[{tokens}, {depth}] x [{outputs}, {depth}], {dtype}"
        figures = ms["xla"], ms["cpu"], ms["xla"] / ms["cpu"], read / ms["cpu"] / 1e6, work / ms["cpu"] / 1e6
        print(row.format(name, *(f"{f:.2f}" for f in figures)), flush=True)


def quantised_table(rounds: int) -> None:
    row = "{:<44} {:>9} {:>9} {:>10}"
    print(row.format("quantised: x [T, 2048], w [8192, 2048]", "C++ ms", "GB/s", "GFLOP/s"))
    for format, tokens in QUANTISED:
        call, nbytes = quantised_call(format, tokens)
        each = fastest({"cpu": call}, rounds)["cpu"] / 3
        work = 2 * tokens * 2048 * 8192
        print(
            row.format(f"{format}, T {tokens}", f"{each:.2f}", f"{nbytes / each / 1e6:.1f}", f"{work / each / 1e6:.0f}")
        )


def grouped_table(rounds: int) -> None:
    row = "{:<44} {:>9} {:>9} {:>10}"
    print(row.format(f"experts: {EXPERTS} of [{OUTPUTS}, {DEPTH}], {USED} a token", "ms", "GB/s", "GFLOP/s"))
    for name, tokens in [(None, 1), (None, 16), *GROUPED]:
        label = f"XLA, float32, T {tokens}" if name is None else f"C++, {name}, T {tokens}"
        call, nbytes = grouped_call(name, tokens)
        each = fastest({label: call}, rounds)[label] / (1 if name is None else ROUTINGS)
        work = 2 * tokens * USED * DEPTH * OUTPUTS
        print(row.format(label, f"{each:.2f}", f"{nbytes / each / 1e6:.1f}", f"{work / each / 1e6:.0f}"), flush=True)


if __name__ == "__main__":
    main()
