"""Named values inside a model's forward: how a file marks them, how they are found, how a step brings them out.

A mark is JAX's own checkpoint_name: a name in the traced program, of which nothing is left when that is lowered. So
nobody pays for marks, and a model file may as well make them with `jax.ad_checkpoint` alone. Values that are asked for
become results of the traced program; a program that is asked for none is the one that it was.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import DropVar, Literal, jaxprs_in_params
from jax.extend.core.primitives import jit_p, name_p, remat_p

from jaxserve.captured import DTYPES
from jaxserve.errors import ConfigError
from jaxserve.request import TapInfo
from jaxserve.spec import Model, ParamSpec

HIDDEN = "hidden"
"""What forward returns; every model has it."""

_CALLS = (jit_p, remat_p)
"""Calls whose bodies can stand in their place. Other bodies run several times, not at all, or somewhere else."""
_TOKENS = 13
"""T of the trace in which marks are looked for: unlike most sizes of a model, so that no axis is taken for it."""


def tap[Value](x: Value, name: str) -> Value:
    """x itself, an array [T, ...], which can be had under this name: `--capture NAME`.

    Of a layer's values the number belongs to the name: `x = x + tap(swiglu(p, h), f"layers.{layer}.mlp")`. Those of the
    model files here are `embed`, the residual stream before the first layer; of each layer `attention` and `mlp`, what
    the two add to that stream, and `block`, the stream after both.
    """
    named: Value = checkpoint_name(x, name)
    return named


def find_taps(model: Model, config: Any, dtype: Any, patterns: Iterable[str]) -> tuple[TapInfo, ...]:
    """The values that shell patterns name, in the order of forward; `*` takes dots, too.

    `dtype`: of the activations. Raises ConfigError for a pattern that matches nothing, saying what there is, and for a
    value that cannot be had: one of several of a name, in the body of a loop, without an axis of tokens.
    """
    found = list(_marks_of(model, config, dtype))
    patterns, names = list(patterns), Counter(mark.name for mark in found)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"capture {pattern!r}: {model.name} has no such value; it has {', '.join(listed(names))}")
    wanted = [mark for mark in found if any(fnmatchcase(mark.name, pattern) for pattern in patterns)]
    for mark in wanted:
        about = f"capture {mark.name!r}: {model.name}"
        if mark.inside is not None:
            raise ConfigError(
                f"{about} marks it inside {mark.inside}, which lets no value out; mark it outside of that"
            )
        if names[mark.name] > 1:
            raise ConfigError(
                f"{about} gives that name to {names[mark.name]} values; a value of a layer has the layer's number in "
                "its name"
            )
        if mark.shape[:1] != (_TOKENS,):
            raise ConfigError(f"{about} marks a value of {list(mark.shape)}; its first axis must be the step's tokens")
        if mark.dtype not in DTYPES:
            raise ConfigError(f"{about} marks a value of {mark.dtype}; captured are {', '.join(DTYPES)}")
    return tuple(TapInfo(mark.name, mark.shape[1:], mark.dtype) for mark in wanted)


def with_values(
    forward: Callable[..., tuple[jax.Array, Any]], taps: Sequence[TapInfo], *arguments: Any
) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
    """forward(*arguments) -> hidden, cache, and the values of `taps`, each [T, *shape].

    Raises ConfigError where they are not what the taps say.
    """
    names = [info.name for info in taps]
    jaxpr, shapes = jax.make_jaxpr(forward, return_shape=True)(*arguments)
    values: dict[str, jax.Array] = {}
    results = _run(jaxpr, jax.tree.leaves(arguments), frozenset(names), values)
    hidden, cache = jax.tree.unflatten(jax.tree.structure(shapes), results)
    values.setdefault(HIDDEN, hidden)
    for info in taps:
        there = values.get(info.name)
        if there is None or there.shape != (hidden.shape[0], *info.shape) or there.dtype.name != info.dtype:
            now = "gone" if there is None else f"{list(there.shape)} of {there.dtype}"
            raise ConfigError(
                f"capture {info.name!r}: it was {list(info.shape)} of {info.dtype} a token, and is {now} now"
            )
    return hidden, cache, tuple(values[name] for name in names)


@dataclass(frozen=True)
class _Mark:
    name: str
    shape: tuple[int, ...]
    dtype: str
    inside: str | None = None
    """What it lies in that cannot be opened."""


def _marks_of(model: Model, config: Any, dtype: Any) -> Iterator[_Mark]:
    """Every mark that a trace of the model on shapes meets, those of logits too, and what forward returns."""

    def attend(layer: Any, q: Any, k: Any, v: Any, cache: Any, **options: Any) -> tuple[Any, Any]:
        return q[..., : options.get("value_dim")], cache

    def shape(*sizes: int, kind: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, kind)

    specs = model.param_specs(config)
    params = jax.tree.map(lambda spec: shape(*spec.shape), specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    row, cache = shape(_TOKENS, kind=jnp.int32), shape(1, 1, model.cache_spec(config).row)
    forward, (hidden, _) = jax.make_jaxpr(
        lambda params, tokens, positions, cache: model.forward(params, config, tokens, positions, cache, attend),
        return_shape=True,
    )(params, row, row, cache)
    yield from _marks(forward)
    yield _Mark(HIDDEN, hidden.shape, hidden.dtype.name)
    if model.causal:
        logits = jax.make_jaxpr(lambda params, hidden: model.logits(params, config, hidden))(params, hidden)
        yield from _marks(logits, "logits")


def _marks(jaxpr: Any, inside: str | None = None) -> Iterator[_Mark]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is name_p:
            value = eqn.outvars[0].aval
            yield _Mark(eqn.params["name"], value.shape, value.dtype.name, inside)
            continue
        opened = eqn.primitive in _CALLS
        for body in jaxprs_in_params(eqn.params):
            yield from _marks(body, inside if opened else inside or eqn.primitive.name)


def _run(
    jaxpr: Any, arguments: Sequence[jax.Array], wanted: frozenset[str], values: dict[str, jax.Array]
) -> list[jax.Array]:
    """What the program gives; `values` gets what it marks with the wanted names."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*jaxpr.consts, *arguments], strict=True))

    def read(atoms: Iterable[Any]) -> list[jax.Array]:
        return [atom.val if isinstance(atom, Literal) else known[atom] for atom in atoms]

    def evaluate(eqns: list[Any]) -> None:
        made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars if not isinstance(v, DropVar))
        used = dict.fromkeys(a for eqn in eqns for a in eqn.invars if not isinstance(a, Literal))
        given = [a for a in used if a not in made]
        part = jaxpr.replace(constvars=(), consts=(), invars=given, outvars=list(made), eqns=eqns)
        known.update(zip(made, jax.core.eval_jaxpr(part, (), *read(given)), strict=True))

    marked: list[tuple[str, Any]] = []
    plain: list[Any] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is name_p and eqn.params["name"] in wanted:
            marked.append((eqn.params["name"], eqn.invars[0]))
        if eqn.primitive in _CALLS and any(mark.name in wanted for mark in _marks(eqn.params["jaxpr"])):
            evaluate(plain)
            plain = []
            results = _run(eqn.params["jaxpr"], read(eqn.invars), wanted, values)
            known.update(zip(eqn.outvars, results, strict=True))
        else:
            plain.append(eqn)
    evaluate(plain)
    values.update((name, read([atom])[0]) for name, atom in marked)
    return read(jaxpr.outvars)


def listed(names: Iterable[str]) -> list[str]:
    """The names, those that differ in their first number as one pattern."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name, count=1), []).append(name)
    return [same[0] if len(same) == 1 else f"{pattern} ({len(same)} of them)" for pattern, same in alike.items()]
