"""Matrices of GGUF's block formats on accelerators: how they lie there, and products with them. Knows no checkpoint.

E matrices of a stack, T tokens, K inputs, N outputs, G inputs that share a scale, V vocabulary
"""

import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.formats import Blocks, Format, parts
from kernels_pallas.quantised_matmul.contract import QuantisedMatmul, validate_for_gpu, validate_for_tpu
from kernels_pallas.quantised_matmul.reference import dequantised
from kernels_pallas.quantised_matmul.reference import quantised_matmul as in_xla

_STATIC = {"static": True}  # a field that is part of the tree's structure
_NARROW: dict[str, Any] = {
    "Q4_0": ml_dtypes.int4,
    "Q3_K": ml_dtypes.int4,
    "Q4_1": ml_dtypes.uint4,
    "Q4_K": ml_dtypes.uint4,
    "Q2_K": ml_dtypes.uint4,
}
"""The types of codes that 4 bits hold; others, and what a codebook says, take 8."""
_WITH_MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
LANES, SUBLANES = 128, 8
"""Of a TPU's registers, and of a tile of float32 in its memory."""
_COPIED = 64
"""Rows that are transposed at once: of so many the caches hold what a column needs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """A quantised matrix, or a stack of them, as XLA and the kernels of Pallas multiply it: exactly what the checkpoint
    stores.

    A weight is code * scale - minimum in float32, rounded to `dtype`.
    """

    codes: jax.Array
    """int8, int4 or uint4: [K, N], of a vocabulary, whose rows are looked up, [N, K], of a stack [E, K, N]."""
    scales: jax.Array
    """float32 [K / G, N], of a stack [E, K / G, N]. A stack's axes fill tiles of TPUs on each device: with zeros N
    becomes whole LANES, and K / G whole SUBLANES."""
    minima: jax.Array | None
    """As the scales, where the format has them."""
    shape: tuple[int, ...] = field(metadata=_STATIC)
    """What the model sees, outputs first, and before them how many matrices a stack has."""
    outputs: int = field(metadata=_STATIC)
    """N: the product of the leading axes that are outputs."""
    dtype: DTypeLike = field(metadata=_STATIC)
    """Of the activations."""
    format: Format = field(metadata=_STATIC)
    inputs_first: bool = field(metadata=_STATIC)
    cut: tuple[tuple[str, ...], tuple[str, ...]] = field(default=((), ()), metadata=_STATIC)
    """The mesh axes that divide outputs and inputs."""
    over: tuple[str, ...] | None = field(default=None, metadata=_STATIC)
    """Of a stack those that divide its matrices; None: it is none."""

    @property
    def stacked(self) -> bool:
        return self.over is not None

    @property
    def own_outputs(self) -> int:
        """N of one device, under a shard_map."""
        mesh = jax.sharding.get_abstract_mesh()
        return self.outputs if mesh.size <= 1 else self.outputs // math.prod(mesh.shape[name] for name in self.cut[0])

    @property
    def specs(self) -> tuple[P, P]:
        """How codes are divided, and how scales and minima are."""
        outputs, inputs = (names or None for names in self.cut)
        stack = () if self.over is None else (self.over or None,)
        return P(*stack, *((inputs, outputs) if self.inputs_first else (outputs, inputs))), P(*stack, inputs, outputs)

    @property
    def depth(self) -> int:
        """K."""
        return int(self.codes.shape[self.stacked + (0 if self.inputs_first else 1)])


def leaves_of(params: Any) -> list[Any]:
    """The weights of a tree, a quantised matrix being one."""
    return jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Scaled))


def scaled_shapes(
    format: Format,
    shape: tuple[int, ...],
    outputs: int,
    depth: int,
    dtype: DTypeLike,
    *,
    vocabulary: bool,
    stacked: bool = False,
    shards: tuple[int, int] = (1, 1),
) -> Scaled:
    """The shapes of a matrix of `outputs` rows of `depth` that the model sees as `shape`, or of `shape[0]` such.

    `shards`: over how many devices outputs and inputs are divided.
    """

    def array(own: tuple[int, ...], kind: Any) -> Any:
        return jax.ShapeDtypeStruct((*shape[:stacked], *own), kind)

    places, groups = outputs, depth // format.group
    if stacked:
        places, groups = _whole(outputs, shards[0], LANES), _whole(groups, shards[1], SUBLANES)
    lies = (places, depth) if vocabulary else (depth, places)
    scales = array((groups, places), jnp.float32)
    minima = scales if format.name in _WITH_MINIMA else None
    codes = array(lies, _NARROW.get(format.name, np.int8))
    over = () if stacked else None
    return Scaled(codes, scales, minima, shape, outputs, np.dtype(dtype), format, not vocabulary, over=over)


def _whole(count: int, shards: int, tile: int) -> int:
    """Places of so many tiles on each of the shards that all find one."""
    return -(-count // (shards * tile)) * shards * tile


def lay(
    blocks: Blocks, outputs: np.ndarray, inputs: np.ndarray, like: Scaled, shards: tuple[int, int] = (1, 1)
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes, scales and minima of one matrix on the host, as `like` has them on its devices.

    `outputs` and `inputs` say which of the file's is at each place, -1 none: zeros. Groups of inputs are whole.
    """
    codes, scales, minima = parts(blocks)
    groups = np.where(inputs[:: blocks.format.group] < 0, -1, inputs[:: blocks.format.group] // blocks.format.group)
    if like.stacked:
        outputs, groups = _filled(outputs, shards[0], LANES), _filled(groups, shards[1], SUBLANES)
    codes = _placed(codes, outputs, inputs)
    if like.inputs_first:
        codes = _transposed(codes)
    codes = codes.view(np.dtype(like.codes.dtype))

    def laid(a: np.ndarray) -> np.ndarray:
        return _transposed(_placed(a, outputs, groups))

    return codes, laid(scales), None if minima is None else laid(minima)


def _filled(places: np.ndarray, shards: int, tile: int) -> np.ndarray:
    own = places.reshape(shards, -1)
    return np.pad(own, ((0, 0), (0, -own.shape[1] % tile)), constant_values=-1).reshape(-1)


def _placed(a: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    for axis, places in enumerate((rows, columns)):
        if len(places) != a.shape[axis] or (places != np.arange(len(places))).any():
            a = np.take(a, np.maximum(places, 0), axis)
            a[(slice(None),) * axis + (places < 0,)] = 0
    return a


def _transposed(a: np.ndarray) -> np.ndarray:
    out = np.empty(a.shape[::-1], a.dtype)
    for i in range(0, len(a), _COPIED):
        out[:, i : i + _COPIED] = a[i : i + _COPIED].T
    return out


def multiply(x: Float[Array, "T K"], w: Scaled, dtype: DTypeLike) -> Float[Array, "T N"]:
    """x times w, summed in float32 and rounded once to `dtype`; on a mesh by each device with its part of w.

    Under a shard_map of the caller's it is the part that the device has, which the caller adds up.
    """
    mesh = jax.sharding.get_abstract_mesh()
    outputs, inputs = w.cut

    def part(x: Any, codes: Any, scales: Any, minima: Any, *, dtype: DTypeLike) -> jax.Array:
        kernel = _kernel(x, codes, scales, inputs_first=w.inputs_first)
        return kernel(x, codes, scales, minima, inputs_first=w.inputs_first, dtype=dtype)

    def own(*given: Any) -> jax.Array:
        y = part(*given, dtype=jnp.float32 if inputs else dtype)
        return jax.lax.psum(y, inputs).astype(dtype) if inputs else y

    if mesh.size <= 1 or mesh.manual_axes:
        return part(x, w.codes, w.scales, w.minima, dtype=dtype)
    codes, scales = w.specs
    divided = jax.shard_map(  # a kernel does not say what varies
        own,
        in_specs=(P(None, inputs or None), codes, scales, None if w.minima is None else scales),
        out_specs=P(None, outputs or None),
        check_vma=False,
    )
    result: jax.Array = divided(x, w.codes, w.scales, w.minima)
    return result


def take_rows(w: Scaled, tokens: Int[Array, " T"]) -> Float[Array, "T K"]:
    """Rows of w, those beyond its ends the last ones; on a mesh each device gives those that it has."""
    outputs, _ = w.cut
    tokens = jnp.clip(tokens, 0, w.outputs - 1)

    def own(codes: Any, scales: Any, minima: Any, tokens: Any) -> jax.Array:
        at = tokens - jax.lax.axis_index(outputs) * scales.shape[1] if outputs else tokens
        its = (at >= 0) & (at < scales.shape[1])
        at = jnp.where(its, at, 0)
        own_minima = None if minima is None else jnp.take(minima, at, axis=1)
        taken = jnp.take(codes, at, axis=1) if w.inputs_first else jnp.take(codes, at, axis=0).T
        rows = dequantised(taken, jnp.take(scales, at, axis=1), own_minima).T.astype(w.dtype)
        return jax.lax.psum(jnp.where(its[:, None], rows, 0), outputs) if outputs else rows

    if not outputs or jax.sharding.get_abstract_mesh().size <= 1:
        return own(w.codes, w.scales, w.minima, tokens)
    codes, scales = w.specs
    specs = (codes, scales, None if w.minima is None else scales, P())
    result: jax.Array = jax.shard_map(own, in_specs=specs, out_specs=P(), check_vma=False)(
        w.codes, w.scales, w.minima, tokens
    )
    return result


def traced_for() -> tuple[str | None, str]:
    """The platform of the devices that are traced for, as `Partition.tracing` says, and what a GPU can compute."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    here = jax.devices()[0] if jax.default_backend() == "gpu" else None  # else one that is only described
    return None if device is None else device.platform, "8.0" if here is None else here.compute_capability


def _kernel(x: Any, codes: Any, scales: Any, *, inputs_first: bool) -> QuantisedMatmul:
    """The body for the devices that are traced for; else plain XLA."""
    platform, capability = traced_for()
    try:
        if platform == "tpu":
            validate_for_tpu(x.dtype, x.shape[1], inputs_first=inputs_first)
            return import_module("kernels_pallas.quantised_matmul.tpu").quantised_matmul
        if platform == "gpu":
            validate_for_gpu(x.dtype, capability, codes.dtype, x.shape[1], scales.shape[1])
            return import_module("kernels_pallas.quantised_matmul.gpu").quantised_matmul
    except (ValueError, ImportError):  # Pallas' GPU backends come and go with JAX
        pass
    return in_xla
