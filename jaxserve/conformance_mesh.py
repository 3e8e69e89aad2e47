"""Whether a model file computes the same divided over several devices as on one: fake ones, of a process of its own.

`python -m jaxserve.conformance_mesh` reads {"code", "config"} from standard input and writes a Finding.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import MeshShape
from jaxserve.conformance import LENGTH, Finding, Steps, equal
from jaxserve.dry_run import specs_of, trace
from jaxserve.errors import ConfigError
from jaxserve.model_code import brief, load_model_code, place
from jaxserve.random_weights import draw_params
from jaxserve.sharding import RULES, Partition, meshes
from jaxserve.spec import Model, ParamSpec

CHECK = "sharded is single"
TOLERANCE = 1e-4
"""As conformance's, but a mean over one zero in a hundred numbers is to show, too."""
DEVICES = 4
SHAPES = (MeshShape(model=3), MeshShape(model=2))
"""Three first: hardly a size can be divided by it, so that what is filled up shows, too."""
EXPERTS = MeshShape(expert=2, model=2)


def check_on_meshes(code: str, hf: Mapping[str, Any]) -> Finding:
    """The finding of a process with fake devices, for the model of `code` and a config.json of a small one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve.conformance_mesh"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()},
        input=json.dumps({"code": code, "config": dict(hf)}),
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()  # the code may print, too
    if done.returncode or not lines:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        return Finding(CHECK, "FAIL", f"the process with {DEVICES} fake devices ended with {done.returncode}: {last}")
    return Finding(**json.loads(lines[-1]))


def check_divided(model: Model, config: Any) -> Finding:
    """Divides a model of drawn weights over this process's devices; the first difference, or that there is none."""
    specs = jax.tree.leaves(specs_of(model, config), is_leaf=_is_spec)
    shapes = [*SHAPES, *([EXPERTS] if any("experts" in spec.axes for spec in specs) else [])]
    prompt = np.random.default_rng(1).integers(0, config.vocab, LENGTH).astype(np.int32)
    right = None
    done, refused = [], []
    for shape in shapes:
        (mesh,) = meshes(shape, jax.local_devices()[: shape.devices])
        try:
            partition = Partition(mesh, model, config)
        except ConfigError as error:
            refused.append(f"--mesh {shape}: {error.message}")
            continue
        if right is None:
            right = _logits(Steps(model, config), prompt)
        finding = _compare(model, config, specs, partition, prompt, right)
        if finding.outcome == "FAIL":
            return finding
        done.append(finding.detail)
    if not done:
        return Finding(CHECK, "note", f"not looked into, since it is served on one device only. {refused[0]}")
    return Finding(CHECK, "ok", "; ".join(done))


def _compare(
    model: Model, config: Any, specs: list[ParamSpec], partition: Partition, prompt: np.ndarray, right: np.ndarray
) -> Finding:
    devices = partition.mesh.size
    grown = {
        axis: getattr(partition.config, axis)
        for axis in RULES
        if getattr(partition.config, axis, None) != getattr(config, axis, None)
    }
    filled = ", ".join(f"{axis} from {getattr(config, axis)} to {size}" for axis, size in grown.items())
    there = f"over {devices} devices" + (f" (with zeros, {filled})" if grown else "")

    def put(spec: ParamSpec, drawn: np.ndarray) -> jax.Array:
        return partition.put(list(drawn) if spec.spread else [drawn], spec, jnp.float32)

    try:
        trace(model, partition.config, jnp.float32, lambda spec: partition.leaf(spec, jnp.float32))
        drawn = jax.tree.map(put, specs_of(model, config), draw_params(specs_of(model, config)), is_leaf=_is_spec)
        found = _logits(Steps(model, config, drawn, partition), prompt)[:, : config.vocab]
    except ConfigError as error:
        cure = "take sizes from the config and the arrays that come as arguments"
        return Finding(CHECK, "FAIL", f"{there}: {error.message}; {cure}")
    except Exception as error:
        return Finding(CHECK, "FAIL", f"{there}: {place(error)}{brief(error)}")
    finding = equal(CHECK, found, right, f"a prompt {there}", "on one", tolerance=TOLERANCE)
    if finding.outcome == "FAIL":
        return replace(finding, detail=f"{finding.detail}; {_cause(model, config, specs, grown, prompt, right)}")
    return finding


def _cause(
    model: Model, config: Any, specs: list[ParamSpec], grown: dict[str, int], prompt: np.ndarray, right: np.ndarray
) -> str:
    """Which axis it is: the one that on one device, filled up in the same way, does the same; or else the heads."""
    for axis, size in grown.items():
        if axis in ("heads", "kv_heads"):
            continue

        def fill(spec: ParamSpec, drawn: np.ndarray, axis: str = axis, size: int = size) -> np.ndarray:
            return np.pad(drawn, [(0, (size - n) * (a == axis)) for a, n in zip(spec.axes, spec.shape, strict=True)])

        drawn = jax.tree.map(fill, specs_of(model, config), draw_params(specs_of(model, config)), is_leaf=_is_spec)
        found = _logits(Steps(model, replace(config, **{axis: size}), drawn), prompt)[:, : config.vocab]
        if not np.abs(found - right).max() <= TOLERANCE * np.abs(right).max():
            named = ", ".join(spec.name for spec in specs if axis in spec.axes)
            return (
                f"it is axis {axis}: filled up with zeros to {size}, it makes one device differ, too. Something takes "
                f"all of it at once, as a mean or a norm does (which weight(..., together=True) tells), or reckons "
                f"with its size. It is an axis of {_few(named)}"
            )
    named = ", ".join(spec.name for spec in specs if {"heads", "kv_heads"} & set(spec.axes))
    return (
        "it is axis heads or kv_heads: each device has some kv heads and the query heads of each, those that lie "
        "side by side. Either forward mixes heads otherwise than in attend and in products with weights, or it reckons "
        f"with their number, or a spec names the wrong axis. They are axes of {_few(named)}"
    )


def _few(named: str, most: int = 200) -> str:
    return named if len(named) <= most else named[: named.rindex(",", 0, most)] + ", ..."


def _logits(steps: Steps, prompt: np.ndarray) -> np.ndarray:
    """[T, V] of a prompt through the paged cache."""
    return steps.step([(0, prompt)], steps.empty())[0][0]


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def main() -> None:
    asked = json.loads(sys.stdin.read())
    model = load_model_code(asked["code"])
    with jax.default_matmul_precision("highest"):
        found = check_divided(model, model.config_from_hf(asked["config"]))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
