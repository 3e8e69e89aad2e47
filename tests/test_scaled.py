"""Quantised weights without the CPU's kernels: what is kept, what it multiplies to, and where it is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import EXPERTS, model_tensors, write_model
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve import quant
from jaxserve.config import DeviceOptions, MeshShape, ModelOptions
from jaxserve.errors import ConfigError
from jaxserve.formats import FORMATS, Blocks, dequantise, parts, quantise
from jaxserve.loading import load_model
from jaxserve.scaled import Scaled, leaves_of
from jaxserve.sharding import Partition, bytes_per_device, meshes
from jaxserve.spec import ParamSpec

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
QUANTISED = [f for f in FORMATS.values() if f.quantised]
PLAIN = DeviceOptions(attention="reference", compile_cache_dir="")


def test_on_four_devices():
    """What four_devices.py has, in a process that has them."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "four_devices.py")]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("format", QUANTISED, ids=lambda f: f.name)
def test_parts_are_what_dequantise_computes(format):
    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    raw = quantise(format, rows)
    codes, scales, minima = parts(Blocks(format, raw))
    assert codes.dtype == np.int8 and scales.shape == (3, 512 // format.group)
    values = codes.astype(np.float32).reshape(3, -1, format.group) * scales[..., None]
    values = values if minima is None else values - minima[..., None]
    assert (values.reshape(3, 512) == dequantise(format, raw)).all()
    with pytest.raises(ValueError, match="no whole blocks"):
        parts(Blocks(format, raw[:, 1:]))


def one_device():
    found = object.__new__(Partition)
    found.mesh, found._places = meshes(MeshShape(), jax.local_devices()[:1])[0], {}
    return found


@pytest.mark.parametrize("format", QUANTISED, ids=lambda f: f.name)
@pytest.mark.parametrize("axes", ["heads head_dim width", "width heads head_dim", "vocab width"])
def test_a_kept_matrix_is_its_dequantised_self(format, axes):
    names = tuple(axes.split())
    shape = {"heads head_dim width": (4, 8, 256), "width heads head_dim": (32, 8, 32), "vocab width": (32, 256)}[axes]
    outputs = 1 if len(shape) == 2 or names[0] == "width" else 2
    rng = np.random.default_rng(1)
    raw = quantise(format, rng.normal(size=(32, 256)).astype(np.float32))
    w = one_device().put_scaled(lambda i: Blocks(format, raw), ParamSpec(names, shape, "w", matrix=True), jnp.float32)
    assert w.shape == shape and w.depth == 256 and w.inputs_first == (names[0] != "vocab")
    dense = dequantise(format, raw)
    x = rng.normal(size=(5, 256)).astype(np.float32)
    want = x.astype(np.float64) @ dense.T.astype(np.float64)
    got = np.asarray(quant.linear(jnp.asarray(x), w, out=outputs)).reshape(5, 32)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    if outputs == 1:
        assert quant.linear_f32(jnp.asarray(x, jnp.bfloat16), w).dtype == jnp.float32
    if names[0] == "vocab":
        tokens = np.array([0, 31, 7, 99], np.int32)
        assert (np.asarray(quant.embed(w, tokens)) == dense[[0, 31, 7, 31]]).all()
    with pytest.raises(ValueError, match="was multiplied as one of"):
        quant.linear(jnp.asarray(x), w, out=3 - outputs)


def test_a_gguf_file_is_kept_as_it_is(tmp_path):
    """Four bits of a code and an eighth of a scale for each weight, and nothing of it made anew when it is loaded."""
    path = write_model(tmp_path / "m.gguf", kind="Q4_0")
    said = []
    found = load_model(ModelOptions(), PLAIN, path, said.append)
    matrices = [leaf for leaf in leaves_of(found.params) if isinstance(leaf, Scaled)]
    assert len(matrices) == 2 * 7 + 2 and {m.codes.dtype.name for m in matrices} == {"int4"}
    w = found.params["blocks"][0]["gate"]
    assert w.codes.shape == (32, 64) and w.scales.shape == (1, 64) and w.minima is None
    assert bytes_per_device(w) == 32 * 64 // 2 + 64 * 4
    assert not [line for line in said if "plain numbers" in line]


@pytest.mark.parametrize("format", QUANTISED, ids=lambda f: f.name)
@pytest.mark.parametrize("axes", ["experts ffn width", "experts width ffn"])
def test_a_kept_stack_is_its_dequantised_self(format, axes):
    outputs, inputs = (72, 256) if axes.endswith("width") else (40, 512)
    rng = np.random.default_rng(1)
    raw = [quantise(format, rng.normal(size=(outputs, inputs)).astype(np.float32)) for _ in range(3)]
    spec = ParamSpec(tuple(axes.split()), (3, outputs, inputs), "w.*", matrix=True)
    w = one_device().put_scaled(lambda i: Blocks(format, raw[i]), spec, jnp.float32)
    assert w.shape == (3, outputs, inputs) and w.stacked and (w.outputs, w.depth) == (outputs, inputs)
    assert all(n % tile == 0 for a in jax.tree.leaves(w) for n, tile in zip(a.shape[1:], (8, 128), strict=True))
    x, sizes = rng.normal(size=(12, inputs)).astype(np.float32), jnp.array([2, 0, 7], jnp.int32)
    got = np.asarray(quant.grouped_linear(jnp.asarray(x), w, sizes, np.int32(1)))
    want, dense = np.zeros((12, outputs)), [dequantise(format, part) for part in raw]
    want[1:3], want[3:10] = x[1:3] @ dense[0].T, x[3:10] @ dense[2].T
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    with pytest.raises(ValueError, match="was multiplied as one of"):
        quant.linear(jnp.asarray(x), w)


def test_a_matrix_is_no_stack():
    spec = ParamSpec(("ffn", "width"), (32, 64), "w", matrix=True)
    with pytest.raises(ValueError, match="no stack of matrices"):
        quant.grouped_linear(jnp.ones((2, 64)), one_device().scaled(spec, FORMATS["Q4_0"], 32, jnp.float32), None)


def mixture(path, kind):
    """Qwen3's with three experts as a GGUF file."""
    keys = {f"qwen3moe.{key}": value for key, value in (EXPERTS | {"expert_feed_forward_length": 64}).items()}
    return write_model(path, "qwen3moe", tensors=model_tensors("qwen3moe", experts=True), metadata=keys, kind=kind)


def test_experts_of_a_gguf_file_are_kept_as_they_are(tmp_path):
    said = []
    found = load_model(ModelOptions(), PLAIN, mixture(tmp_path / "m.gguf", "Q4_0"), said.append)
    block = found.params["blocks"][0]
    assert all(isinstance(block[name], Scaled) and block[name].stacked for name in ("gate", "up", "down"))
    assert block["down"].codes.dtype == jnp.int4 and block["down"].codes.shape == (3, 64, 128)
    assert not [line for line in said if "plain numbers" in line]


def test_what_only_the_cpu_has_is_refused_before_a_weight_is_read():
    said = []
    message = "quantization q6_k needs the CPU and its C.. kernels, .*; elsewhere give q8_0, q4_k, q4_0"
    with pytest.raises(ConfigError, match=message):
        load_model(ModelOptions(quantization="q6_k"), PLAIN, GOLDENS / "llama3", said.append)
    assert not [line for line in said if "weights" in line]


def test_what_is_quantised_already_is_refused(tmp_path):
    path = write_model(tmp_path / "m.gguf", kind="Q4_0")
    with pytest.raises(ConfigError, match="is Q4_0 already; leave the option out"):
        load_model(ModelOptions(quantization="q8_0"), PLAIN, path, lambda line: None)


def kernels(platform, dtype, inputs):
    """How many kernels are in a product that is traced for a platform, in one with a vocabulary, and with a stack."""
    like = one_device()
    matrix = like.scaled(ParamSpec(("ffn", "width"), (64, inputs), "w", matrix=True), FORMATS["Q4_0"], 64, dtype)
    table = like.scaled(ParamSpec(("vocab", "width"), (64, inputs), "v", matrix=True), FORMATS["Q8_0"], 64, dtype)
    experts = ParamSpec(("experts", "ffn", "width"), (4, 64, inputs), "w.*", matrix=True)
    stack = like.scaled(experts, FORMATS["Q4_0"], 64, dtype)
    device = AbstractDevice("a chip", 1, platform)
    x = jax.ShapeDtypeStruct((8, inputs), dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        texts = [str(jax.make_jaxpr(quant.linear)(x, w)) for w in (matrix, table)]
        texts.append(str(jax.make_jaxpr(quant.grouped_linear)(x, stack, jax.ShapeDtypeStruct((4,), jnp.int32))))
    return [len(re.findall("name=jaxserve_(?:quantised|grouped)_matmul", text)) for text in texts]


def test_each_platform_takes_its_own():
    for dtype in (jnp.bfloat16, jnp.float32):
        assert kernels("tpu", jnp.dtype(dtype), 128) == kernels("gpu", jnp.dtype(dtype), 128) == [1, 1, 1]
    assert kernels("tpu", jnp.dtype(jnp.float16), 128) == [0, 0, 0], "which the TPU's does not multiply"
    assert kernels("tpu", jnp.dtype(jnp.bfloat16), 96) == [1, 0, 1], "rows that are no whole lanes"
    assert kernels("cpu", jnp.dtype(jnp.float32), 128) == [0, 0, 0]
