"""Our kernels' products on one GPU, of experts and of quantised matrices: right by float32, and beside plain XLA.

A part of bench_gpu.py. A product's weights are more than the GPU's caches hold.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_figures import REPEATS, Figure, Scale, check_device, fastest

SHAPES = {"llama-3.1-8b": (4096, 14336), "qwen3-0.6b": (1024, 3072)}
"""Inputs and outputs of a model's widest products."""
TOKENS = (1, 16, 256)
EXPERTS, USED = 64, 8
GROUP = 32
FORMATS = {"8 bits": ("int8", False), "4 bits": ("int4", False), "4 bits with minima": ("uint4", True)}


def products(scale: Scale, model: str, folder: Path) -> list[Figure]:
    """Errors are shares of the largest number of a result, times those of a plain product of bfloat16."""
    check_device(scale)
    inputs, outputs = (256, 64) if scale.dry else SHAPES[model]
    tokens = (2,) if scale.dry else TOKENS
    found: list[Figure] = []
    for name, (kind, minima) in FORMATS.items():
        for count in tokens:
            found += _compared(
                f"{name}, {count}", *_quantised(scale, count, inputs, outputs, kind, minima), scale.rounds
            )
    for count in tokens:
        # As Qwen3 30B A3B has them: narrow ones, and many.
        for name, experts in (("experts", _experts), ("experts of 4 bits", _quantised_experts)):
            found += _compared(f"{name}, {count}", *experts(scale, count, inputs // 2, outputs // 16), scale.rounds)
    return found


type Product = Callable[..., Any]


def _compared(name: str, ours: Product, xla: Product, given: tuple[Any, ...], read: int, rounds: int) -> list[Figure]:
    """`xla` gives the same with the weights' own arguments in float32; raises SystemExit if ours is another."""
    import jax
    import jax.numpy as jnp

    x, weights = given[0], given[1:]
    got = jax.jit(ours)(x, *weights).astype(jnp.float32)
    want = jax.jit(partial(xla, exact=True))(x.astype(jnp.float32), *weights)
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    limit = 1e-4 if x.dtype == jnp.float32 else 2e-2
    if not error < limit:
        raise SystemExit(f"products, {name}: off by {error}")

    def repeated(product: Product) -> Callable[[], Any]:
        def one(_: Any, carry: Any) -> Any:  # each waits for the one before, and makes anew what it makes of weights
            x, weights = jax.lax.optimization_barrier(carry)
            return x + (0 * product(x, *weights)[:, :1]).astype(x.dtype), weights

        run = jax.jit(lambda *carry: jax.lax.fori_loop(0, REPEATS, one, carry)[0])
        return lambda: run(x, weights)

    seconds = fastest(repeated(ours), rounds) / REPEATS
    return [
        Figure(f"products, {name}: largest error against float32", error, "of 1"),
        Figure(f"products, {name}: time", 1e6 * seconds, "us"),
        Figure(f"products, {name}: weights read", read / seconds / 1e9, "GB/s"),
        Figure(f"products, {name}: time of XLA's, of ours", fastest(repeated(xla), rounds) / REPEATS / seconds, "x"),
    ]


def _quantised(
    scale: Scale, tokens: int, inputs: int, outputs: int, kind: str, minima: bool
) -> tuple[Product, Product, tuple[Any, ...], int]:
    """Ours, XLA's, what they are given, and the bytes of the matrix."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.quantised_matmul.gpu import quantised_matmul
    from kernels_pallas.quantised_matmul.reference import quantised_matmul as reference

    keys = jax.random.split(jax.random.key(0), 4)
    low, high = {"int8": (-127, 128), "int4": (-8, 8), "uint4": (0, 16)}[kind]
    codes = jax.random.randint(keys[0], (inputs, outputs), low, high).astype(kind)
    of_scales = (inputs // GROUP, outputs)
    scales = jax.random.uniform(keys[1], of_scales, minval=0.5, maxval=1.5)
    lowest = 8 * jax.random.uniform(keys[2], of_scales) if minima else None
    x = jax.random.normal(keys[3], (tokens, inputs), jnp.float32 if scale.dry else jnp.bfloat16)

    def ours(x: Any, *weights: Any) -> Any:
        return quantised_matmul(x, *weights, inputs_first=True, interpret=scale.dry)

    def xla(x: Any, codes: Any, scales: Any, minima: Any, exact: bool = False) -> Any:
        # Exact: of weights that are rounded as ours are.
        if not exact or scale.dry:
            return reference(x, codes, scales, minima, inputs_first=True)
        return reference(x.astype(jnp.bfloat16), codes, scales, minima, inputs_first=True, dtype=jnp.float32)

    nbytes = codes.size * (8 if kind == "int8" else 4) // 8 + scales.nbytes * (2 if minima else 1)
    return ours, xla, (x, codes, scales, lowest), nbytes


def _experts(scale: Scale, tokens: int, inputs: int, outputs: int) -> tuple[Product, Product, tuple[Any, ...], int]:
    """The same of a stack of matrices, each token with USED of them; the bytes of those that are used."""
    import jax

    from jaxserve.quant import ragged
    from kernels_pallas.grouped_matmul.gpu import grouped_matmul
    from kernels_pallas.grouped_matmul.reference import grouped_matmul as one_by_one

    x, sizes = _routed(scale, tokens, inputs)
    w = jax.random.normal(jax.random.key(1), (len(sizes), outputs, inputs), x.dtype)

    def ours(x: Any, w: Any, sizes: Any) -> Any:
        return grouped_matmul(x, w, sizes, interpret=scale.dry)

    def xla(x: Any, w: Any, sizes: Any, exact: bool = False) -> Any:
        return one_by_one(x, w.astype(x.dtype), sizes) if exact or scale.dry else ragged(x, w, sizes)

    return ours, xla, (x, w, sizes), int((sizes > 0).sum()) * w.nbytes // len(sizes)


def _quantised_experts(
    scale: Scale, tokens: int, inputs: int, outputs: int
) -> tuple[Product, Product, tuple[Any, ...], int]:
    """The same of a stack in 4 bits, of which XLA makes plain numbers first."""
    import jax
    import jax.numpy as jnp

    from jaxserve.quant import ragged
    from kernels_pallas.grouped_matmul.contract import Quantised
    from kernels_pallas.grouped_matmul.gpu import grouped_matmul
    from kernels_pallas.grouped_matmul.reference import grouped_matmul as one_by_one
    from kernels_pallas.quantised_matmul.reference import rounded

    x, sizes = _routed(scale, tokens, inputs)
    keys, count, dtype = jax.random.split(jax.random.key(1), 2), len(sizes), x.dtype
    codes = jax.random.randint(keys[0], (count, inputs, outputs), -8, 8).astype(jnp.int4)
    scales = jax.random.uniform(keys[1], (count, inputs // GROUP, outputs), minval=0.5, maxval=1.5)

    def ours(x: Any, codes: Any, scales: Any, sizes: Any) -> Any:
        return grouped_matmul(x, Quantised(codes, scales, None, GROUP), sizes, interpret=scale.dry)

    def xla(x: Any, codes: Any, scales: Any, sizes: Any, exact: bool = False) -> Any:
        if exact or scale.dry:
            return one_by_one(x.astype(dtype), Quantised(codes, scales, None, GROUP), sizes).astype(x.dtype)
        w = jax.vmap(lambda codes, scales: rounded(codes, scales, None, x.dtype).T)(codes, scales)
        return ragged(x, w, sizes)

    read = int((sizes > 0).sum()) * (inputs * outputs // 2 + 4 * scales[0].size)
    return ours, xla, (x, codes, scales, sizes), read


def _routed(scale: Scale, tokens: int, inputs: int) -> tuple[Any, Any]:
    """Rows of tokens, each with USED experts, and how many rows are whose."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    count, used = (4, 2) if scale.dry else (EXPERTS, USED)
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(count)[:used] for _ in range(tokens)])
    sizes = jnp.asarray(np.bincount(chosen, minlength=count), jnp.int32)
    dtype = jnp.float32 if scale.dry else jnp.bfloat16
    return jax.random.normal(jax.random.key(0), (tokens * used, inputs), dtype), sizes
