"""The door for models written as flax.nnx modules: makes a model file's four parts of a module class.

class Decoder(nnx.Module):
    def __init__(self, config, *, rngs): ...
    def __call__(self, tokens, positions, cache, attend): ...   # -> hidden [T, D], cache
    def logits(self, hidden): ...                               # -> float32 [S, V]

Config, param_specs, forward, logits = from_nnx(Config, Decoder, names)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import ConfigError
from jaxserve.spec import Attend, Cache, ParamSpec


@dataclass(frozen=True)
class Kernel:
    """A weight [inputs..., outputs...], as nnx has it, that a checkpoint holds as torch does: outputs first."""

    name: str
    """In the checkpoint."""
    inputs: int = 1
    """How many leading axes of the module's weight are inputs; 2 for the LinearGeneral after attention."""


class NnxModel(NamedTuple):
    """What a model file has."""

    Config: Any
    param_specs: Callable[[Any], dict[str, ParamSpec]]
    forward: Callable[..., tuple[jax.Array, Cache]]
    logits: Callable[..., jax.Array]


class _Outline(NamedTuple):
    """A module without its weights."""

    graph: Any
    params: dict[tuple[Any, ...], Any]
    """By path, the variables of nnx.Param, with shapes for values."""
    rest: Any
    """The state of all other variables, such as tables of the module's own; computed, not loaded."""


def from_nnx(
    config: Any, module: Callable[..., Any], names: Callable[[str], str | Kernel] = lambda path: path
) -> NnxModel:
    """`config`: the class with from_hf, frozen. `module(config, rngs=...)` makes the module; it is only ever traced.

    `names` gives the checkpoint's name of each nnx.Param by its path ("blocks.0.attn.q.kernel"): as it is where the
    checkpoint keeps the module's layout, a Kernel where it keeps torch's. The weights lie on the device as the
    checkpoint has them, in one copy: a Kernel's transposition is part of the product. They are plain arrays, so on CPU
    XLA multiplies them, and `quantization` leaves them as they are.
    """

    def split(made: Any) -> Any:
        return nnx.split(made, nnx.Param, ...)

    @lru_cache(maxsize=8)
    def outline(c: Any) -> _Outline:
        abstract = nnx.eval_shape(lambda: module(c, rngs=nnx.Rngs(0)))
        for path, node in nnx.iter_graph(abstract):
            if isinstance(node, nnx.Module):
                _refuse_bare_arrays(path, node)
            if isinstance(node, nnx.Embed):
                node.dtype = None  # it alone remembers the type that it was made with; the weights' type counts
        abstract.eval()  # no dropout, running averages
        graph, params, rest = split(abstract)
        if nnx.to_flat_state(rest):  # compiled, so that the weights which __init__ draws are never computed
            with jax.ensure_compile_time_eval():
                rest = jax.jit(lambda: split(module(c, rngs=nnx.Rngs(0)))[2])()
        return _Outline(graph, dict(nnx.to_flat_state(params)), rest)

    def param_specs(c: Any) -> dict[str, ParamSpec]:
        return {_dotted(path): _spec(_dotted(path), v.shape, names) for path, v in outline(c).params.items()}

    def built(p: dict[str, Any], c: Any) -> Any:
        known = outline(c)
        flat = []
        for path, variable in known.params.items():
            stored = names(_dotted(path))
            array = p[_dotted(path)]
            if isinstance(stored, Kernel):
                outputs = array.ndim - stored.inputs
                array = jnp.transpose(array, (*range(outputs, array.ndim), *range(outputs)))
            flat.append((path, variable.replace(array)))
        return nnx.merge(known.graph, nnx.from_flat_state(flat), known.rest)

    def forward(
        p: dict[str, Any], c: Any, tokens: jax.Array, positions: jax.Array, cache: Cache, attend: Attend
    ) -> tuple[jax.Array, Cache]:
        with jax.numpy_dtype_promotion("standard"):  # nnx's norms rely on it
            return built(p, c)(tokens, positions, cache, attend)

    def logits(p: dict[str, Any], c: Any, hidden: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return built(p, c).logits(hidden)

    return NnxModel(config, param_specs, forward, logits)


def _spec(path: str, shape: tuple[int, ...], names: Callable[[str], str | Kernel]) -> ParamSpec:
    stored = names(path)
    if not isinstance(stored, Kernel):
        return ParamSpec(_axes(shape), tuple(shape), stored)
    if not 1 <= stored.inputs < len(shape):
        raise ConfigError(f"{path} has {len(shape)} axes, of which a Kernel cannot have {stored.inputs} inputs")
    shape = (*shape[stored.inputs :], *shape[: stored.inputs])
    return ParamSpec(_axes(shape), shape, stored.name)


def _axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"axis{i}" for i in range(len(shape)))


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _refuse_bare_arrays(path: tuple[Any, ...], node: Any) -> None:
    for name, value in vars(node).items():
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            where = _dotted((*path, name))
            raise ConfigError(f"{type(node).__name__}: {where} is a bare array; make it an nnx.Variable")
