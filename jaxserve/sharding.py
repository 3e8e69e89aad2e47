"""Which device holds what: meshes from a MeshShape, and from the logical axes of a weight to its place on one.

A replica's mesh has the axes `expert` and `model`. What is divided over both is attention, the dense feed-forward and
the vocabulary (tensor parallel: Shoeybi et al. 2019, Megatron-LM); see RULES.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxserve.config import MeshShape
from jaxserve.errors import ConfigError
from jaxserve.formats import Blocks, Format
from jaxserve.scaled import Scaled, lay, scaled_shapes
from jaxserve.spec import Model, ParamSpec
from kernels_pallas.ragged_paged_attention.contract import Cache, Int8Cache, RaggedPagedAttention

EVERY = ("expert", "model")
"""The mesh axes of a replica, in order."""

RULES: dict[str, tuple[str, ...]] = {
    "heads": EVERY,
    "kv_heads": EVERY,
    "ffn": EVERY,
    "shared_ffn": EVERY,
    "vocab": EVERY,
    "experts": ("expert",),
    "expert_ffn": ("model",),
    "width": (),
    "head_dim": (),
    "q_dim": (),
    "v_dim": (),
    "kv_up_dim": (),
    "q_rank": (),
    "kv_rank": (),
    "positions": (),
    "types": (),
}
"""Logical axes and the mesh axes that divide them; none: every device has all of it."""


def meshes(shape: MeshShape, devices: Sequence[jax.Device]) -> list[Mesh]:
    """One mesh a replica. Raises ConfigError when there are fewer devices than that takes."""
    if len(devices) < shape.devices:
        raise ConfigError(
            f"mesh {shape} needs {shape.devices} devices, found {len(devices)}; {_instead(shape, devices)}"
        )
    sizes = (shape.data, shape.expert, shape.model)
    if len(devices) == shape.devices:
        grid = mesh_utils.create_device_mesh(sizes, devices)  # neighbours in the mesh are neighbours on the board
    else:
        grid = np.array(devices[: shape.devices]).reshape(sizes)
    return [Mesh(row, EVERY, axis_types=(AxisType.Auto,) * 2) for row in grid]


def _instead(shape: MeshShape, devices: Sequence[jax.Device]) -> str:
    found = len(devices)
    if found == 1:
        return "leave --mesh out"
    if found < shape.per_replica:
        return f"try --mesh 1x{found}"
    return f"try --mesh {replace(shape, data=found // shape.per_replica)}"


@dataclass(frozen=True)
class Heads:
    """Which of a model's heads lies at each place of a sharded array; -1 where there is none: zeros."""

    query: tuple[int, ...]
    kv: tuple[int, ...]


def place_heads(heads: int, kv_heads: int, shards: int) -> Heads:
    """Places for all heads, as many on every shard, the query heads of a kv head on the shards that hold it.

    Where there are fewer kv heads than shards, copies of one serve a part of its query heads each. Of what is possible
    it is that with the smallest KV cache, then with the fewest query heads.
    """
    group = heads // kv_heads

    def places(copies: int) -> tuple[int, int]:
        return -(-kv_heads * copies // shards) * shards, -(-group // copies)

    def cost(copies: int) -> tuple[int, int, int]:
        slots, queries = places(copies)
        return slots, slots * queries, copies

    copies = min(range(1, group + 1), key=cost)
    slots, queries = places(copies)
    query, kv = [], []
    for slot in range(slots):
        head, copy = divmod(slot, copies)
        kv.append(head if head < kv_heads else -1)
        served = range(copy * queries, (copy + 1) * queries)
        query += [head * group + i if head < kv_heads and i < group else -1 for i in served]
    return Heads(tuple(query), tuple(kv))


class Partition:
    """One replica's devices, and how a model is divided over them. Knows no weights; any device will do, also one
    that is only described (jax.experimental.topologies).
    """

    def __init__(self, mesh: Mesh, model: Model, config: Any):
        """Raises ConfigError for a model that cannot be divided so."""
        self.mesh = mesh
        self.config = config
        """The model's, with the sizes that its weights have on the mesh."""
        self._kv = EVERY if getattr(config, "value_dim", None) is None else None
        """What divides keys and values; latents, which are every head's, are on every device."""
        self._places: dict[str, np.ndarray] = {}
        if mesh.size > 1:
            self._divide(model, config)

    def _divide(self, model: Model, config: Any) -> None:
        specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
        sizes: dict[str, int] = {}
        for spec in specs:
            for axis, size in zip(spec.axes, spec.shape, strict=True):
                if axis not in RULES:
                    raise ConfigError(f"{spec.name}: no rule divides axis {axis!r}; known are {', '.join(RULES)}")
                sizes[axis] = size
        needed = ("heads", "kv_heads") if self._kv else ("heads",)
        if not {*needed} <= sizes.keys():
            raise ConfigError(
                f"{model.name} has no weights with the axes {' and '.join(needed)}, so its attention cannot be "
                "divided; give it one device"
            )
        if self.mesh.shape["expert"] > 1 and "experts" not in sizes:
            raise ConfigError(f"{model.name} has no experts to divide; give mesh model={self.mesh.size}")
        heads = place_heads(sizes["heads"], sizes.get("kv_heads", 1), self.mesh.size)
        for axis, size in sizes.items():
            shards = self._shards(RULES[axis])
            if axis == "experts" and size % shards:
                raise ConfigError(f"{size} experts cannot be divided over expert={shards}; give a divisor of {size}")
            places = np.arange(-(-size // shards) * shards)
            self._places[axis] = np.where(places < size, places, -1)
        self._places["heads"] = np.array(heads.query)
        if self._kv:
            self._places["kv_heads"] = np.array(heads.kv)
        for spec in specs:
            for axis in spec.axes if spec.together else ():
                copies = np.bincount(self._places[axis] + 1, minlength=sizes[axis] + 1)  # of -1, of each that there is
                if copies[0] or (copies[1:] != copies[1]).any():
                    raise ConfigError(
                        f"{spec.name}: a norm over all {axis} together, so none can be added to divide the "
                        f"{sizes[axis]} over {self.mesh.size} devices; give a number that divides them"
                    )
        grown = {axis: len(places) for axis, places in self._places.items() if len(places) != sizes[axis]}
        self.config = replace(config, **grown)

    def _shards(self, names: Sequence[str]) -> int:
        return int(np.prod([self.mesh.shape[name] for name in names], dtype=int))

    @property
    def everywhere(self) -> Sharding:
        """Of what every device has whole."""
        return self._sharding(P())

    def cache(self, shapes: Cache) -> Cache:
        """The shapes of a KV cache, and where it lies."""
        return jax.tree.map(
            lambda a, cut: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._sharding(cut)),
            shapes,
            self._cut(shapes),
        )

    def leaf(self, spec: ParamSpec, dtype: Any) -> jax.ShapeDtypeStruct:
        """A weight's shape on the mesh, and where it lies."""
        if self.mesh.size == 1:
            return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=self.everywhere)
        shape = tuple(len(self._places[axis]) for axis in spec.axes)
        sharding = self._sharding(P(*(names or None for names in _mesh_axes(spec))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _sharding(self, spec: P) -> Sharding:
        if self.mesh.size == 1:
            return SingleDeviceSharding(self.mesh.devices.item())
        return NamedSharding(self.mesh, spec)

    def put(self, tensors: Sequence[np.ndarray], spec: ParamSpec, dtype: Any) -> jax.Array:
        """A weight of the host on its devices, from the tensors that hold it, of which only what they need is read.

        Places without a head, a feature or a token are zeros, which change no result: they meet zeros again on their
        way back to the residual stream, and no one asks for such a token.
        """
        stored = [tensor.reshape(spec.tensor_shape) for tensor in tensors]
        places = [self._places[axis] for axis in spec.axes]
        leaf = self.leaf(spec, dtype)
        shape, sharding = leaf.shape, leaf.sharding
        blocks: dict[Any, np.ndarray] = {}
        arrays = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True))
            if bounds not in blocks:
                part = [p[a:b] for p, (a, b) in zip(places, bounds, strict=True)]
                blocks[bounds] = _stack(stored, part, dtype) if spec.spread else _block(stored[0], part, dtype)
            arrays.append(jax.device_put(blocks[bounds], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def scaled(self, spec: ParamSpec, format: Format, outputs: int, dtype: Any) -> Scaled | None:
        """The shapes of a quantised matrix of `outputs` rows, or of a stack of them, on the mesh, and where it lies.

        None where it cannot lie there: a device's part, or a head's, would cut a group of inputs that share a scale.
        """
        laid = self._rows_and_inputs(spec, outputs)
        if laid is None:
            return None
        (rows, inputs), cut = laid
        group, shards = format.group, (self._shards(cut[0]), self._shards(cut[1]))
        if len(inputs) % (shards[1] * group):
            return None
        groups = inputs.reshape(-1, group)
        whole = (groups[:, :1] >= 0) & (groups[:, :1] % group == 0) & (groups == groups[:, :1] + np.arange(group))
        if not (whole | (groups < 0)).all():
            return None
        vocabulary, shape = spec.axes[0] == "vocab", self.leaf(spec, dtype).shape
        like = scaled_shapes(
            format, shape, len(rows), len(inputs), dtype, vocabulary=vocabulary, stacked=spec.spread, shards=shards
        )
        over = _mesh_axes(spec)[0] if spec.spread and self.mesh.size > 1 else like.over
        like = replace(like, cut=cut, over=over)

        def lie(a: Any, cut: P) -> Any:
            return None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._sharding(cut))

        of_codes, of_scales = like.specs
        return replace(
            like,
            codes=lie(like.codes, of_codes),
            scales=lie(like.scales, of_scales),
            minima=lie(like.minima, of_scales),
        )

    def put_scaled(self, matrix: Callable[[int], Blocks], spec: ParamSpec, dtype: Any) -> Scaled | None:
        """A quantised matrix of the host, matrix(0), or a stack of them, on its devices; None as `scaled`.

        Of a stack only those are asked for that are this host's.
        """
        first = matrix(0)
        outputs = len(first.rows)
        like, laid = self.scaled(spec, first.format, outputs, dtype), self._rows_and_inputs(spec, outputs)
        if like is None or laid is None:
            return None

        def put(a: np.ndarray | None, to: Any) -> Any:
            if a is None:
                return None
            return jax.make_array_from_callback(a.shape, to.sharding, lambda index: np.ascontiguousarray(a[index]))

        shards = self._shards(like.cut[0]), self._shards(like.cut[1])

        def one(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
            return lay(matrix(i) if i else first, *laid[0], like, shards)

        codes, scales, minima = self._stacked(one, like) if spec.spread else one(0)
        return replace(
            like, codes=put(codes, like.codes), scales=put(scales, like.scales), minima=put(minima, like.minima)
        )

    def _stacked(
        self, one: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray | None]], like: Scaled
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """`lay` of a stack's matrices one after the other, those that are on no device of this host left out."""
        codes, scales = np.empty(like.codes.shape, like.codes.dtype), np.empty(like.scales.shape, np.float32)
        minima = None if like.minima is None else np.empty(like.minima.shape, np.float32)
        its = like.codes.sharding.addressable_devices_indices_map(like.codes.shape).values()
        for i in sorted({i for index in its for i in range(*(index or (slice(None),))[0].indices(like.shape[0]))}):
            codes[i], scales[i], lowest = one(i)
            if minima is not None:
                minima[i] = lowest
        return codes, scales, minima

    def _rows_and_inputs(
        self, spec: ParamSpec, outputs: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[tuple[str, ...], tuple[str, ...]]] | None:
        """Which of the file's rows, and which of its inputs, is at each place of a matrix of `outputs` rows, or of a
        stack's, -1 none, and the mesh axes that divide both; None if it is none, or not divided in one piece a device.
        """
        shape, axes = spec.tensor_shape, spec.axes[len(spec.shape) - len(spec.tensor_shape) :]
        ends = [i for i in range(1, len(shape)) if np.prod(shape[:i], dtype=int) == outputs]
        if not ends:
            return None
        names = _mesh_axes(spec)[-len(axes) :] if self.mesh.size > 1 else [()] * len(axes)
        flat, cut = list[np.ndarray](), list[tuple[str, ...]]()
        for of in (slice(0, ends[0]), slice(ends[0], None)):
            if any(names[of][1:]):
                return None
            flat.append(self._flat(axes[of], shape[of]))
            cut.append(names[of][0])
        return (flat[0], flat[1]), (cut[0], cut[1])

    def _flat(self, axes: Sequence[str], shape: Sequence[int]) -> np.ndarray:
        """The places along several axes as those along one."""
        found = np.zeros(1, int)
        for axis, size in zip(axes, shape, strict=True):
            places = self._places[axis] if self.mesh.size > 1 else np.arange(size)
            both = found[:, None] * size + places
            found = np.where((found[:, None] < 0) | (places < 0), -1, both).reshape(-1)
        return found

    def over_heads(self, kernel: RaggedPagedAttention) -> RaggedPagedAttention:
        """The kernel, run by each device on its own heads and its own part of the cache."""
        if self.mesh.size == 1:
            return kernel
        heads, kv_heads = P(None, EVERY, None), P(None, self._kv, None)

        def sharded(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array | None,
            cache: Cache,
            kv_lens: jax.Array,
            page_table: jax.Array,
            cu_q_lens: jax.Array,
            distribution: jax.Array,
            *,
            scale: float,
            window: int | None = None,
            soft_cap: float | None = None,
            sinks: jax.Array | None = None,
            causal: bool = True,
            value_dim: int | None = None,
            first_page: jax.Array | int = 0,
        ) -> tuple[jax.Array, Cache]:
            options: dict[str, Any] = dict(
                scale=scale, window=window, soft_cap=soft_cap, causal=causal, value_dim=value_dim
            )

            def local(sinks: jax.Array | None, first_page: jax.Array, *arrays: Any) -> tuple[jax.Array, Cache]:
                return kernel(*arrays, sinks=sinks, first_page=first_page, **options)

            rows = self._cut(cache)
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(
                    None if sinks is None else P(EVERY),
                    P(),
                    heads,
                    kv_heads,
                    None if v is None else kv_heads,
                    rows,
                    *[P()] * 4,
                ),
                out_specs=(heads, rows),
                check_vma=False,  # a kernel of our own does not say how its results vary
            )(sinks, jnp.asarray(first_page, jnp.int32), q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution)

        return sharded

    def _cut(self, cache: Cache) -> Any:
        """How a KV cache is cut between heads: its rows [k0|v0|k1|v1|...], and of a cache of bytes the scales' axis."""
        rows, scales = P(None, None, self._kv), P(None, self._kv, None)
        return Int8Cache(rows, scales) if isinstance(cache, Int8Cache) else rows  # type: ignore[arg-type]

    def by_rows[Result](self, function: Callable[[Any, Any], Result], rows: Any, whole: Any) -> Result:
        """function(rows, whole) of arrays [S, ...] and of others: each device takes its share of the rows.

        Where they do not divide every device takes all. Nothing inside waits for another device.
        """
        if self.mesh.size == 1:
            return function(rows, whole)
        seqs = {a.shape[0] for a in jax.tree.leaves(rows)}
        share = P(EVERY) if all(n % self.mesh.size == 0 for n in seqs) else P()
        call = jax.shard_map(function, mesh=self.mesh, in_specs=(share, P()), out_specs=share, check_vma=False)
        result: Result = call(rows, whole)
        return result

    def whole[Tree](self, tree: Tree) -> Tree:
        """Arrays of which every device has all: nothing that divides their users divides them."""
        return self._constrained(tree, P())

    def by_token(self, logits: jax.Array) -> jax.Array:
        """logits [S, V] as the weights that they come from: else XLA would rather gather those than move logits."""
        return self._constrained(logits, P(None, RULES["vocab"]))

    def _constrained[Tree](self, tree: Tree, spec: P) -> Tree:
        if self.mesh.size == 1:
            return tree
        constrained: Tree = jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))
        return constrained

    def tracing(self) -> contextlib.AbstractContextManager[Any]:
        """What a function for these devices is to be traced in: it tells code of kernels of which kind they are, and
        that there is a mesh. One CPU's are C++, and want neither."""
        if self.mesh.size == 1 and self.mesh.devices.item().platform == "cpu":
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def _mesh_axes(spec: ParamSpec) -> list[tuple[str, ...]]:
    """The mesh axes that divide each axis of a weight; the first one that can be has them."""
    taken: set[str] = set()
    found = []
    for axis in spec.axes:
        found.append(tuple(name for name in RULES[axis] if name not in taken))
        taken |= set(found[-1])
    return found


def bytes_per_device(tree: Any) -> int:
    """Bytes that a tree of arrays, or of their shapes, has on the device that holds most."""

    def bits(dtype: Any) -> int:
        return 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize

    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape) if a.sharding is not None else a.shape)) * bits(a.dtype) // 8
        for a in jax.tree.leaves(tree)
    )


def _block(stored: np.ndarray, places: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """The part of a stored array that `places` name along each axis, zeros for -1."""
    block = np.zeros([len(p) for p in places], dtype)
    for runs in itertools.product(*map(_runs, places)):
        to = tuple(slice(start, start + length) for start, _, length in runs)
        block[to] = stored[tuple(slice(source, source + length) for _, source, length in runs)]
    return block


def _stack(stored: Sequence[np.ndarray], places: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """The same where each element of the first axis is an array of its own."""
    return np.stack([_block(stored[source], places[1:], dtype) for source in places[0]])


def _runs(places: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, source, length) of the stretches of `places` that lie side by side in the source."""
    breaks = np.flatnonzero((np.diff(places) != 1) | (places[1:] == 0)) + 1  # -1, 0 is no stretch
    edges = [0, *breaks.tolist(), len(places)]
    return [(a, int(places[a]), b - a) for a, b in itertools.pairwise(edges) if places[a] >= 0]
