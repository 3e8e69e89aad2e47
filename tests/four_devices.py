"""What tests/test_scaled.py runs in a process of four CPU devices: quantised weights that are divided are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import write_model

from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.conformance import LENGTH, Steps
from jaxserve.loading import load_model
from jaxserve.models import find_model
from jaxserve.random_weights import write_checkpoint
from jaxserve.scaled import Scaled, leaves_of
from jaxserve.sharding import bytes_per_device

# Over two devices all is divided whole groups at a time; over four each would have 80 inputs of `down`, and both kv
# heads twice.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2050,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def loaded(path, mesh, quantization=None):
    said = []
    options = DeviceOptions(mesh=mesh, attention="reference", compile_cache_dir="")
    return load_model(ModelOptions(quantization=quantization), options, path, said.append), said


def logits(found, params=None):
    prompt = np.random.default_rng(0).integers(0, 12, LENGTH).astype(np.int32)
    partition = found.partition if params is None else None
    steps = Steps(found.model, found.config, found.params if params is None else params, partition)
    return steps.step([(0, prompt)], steps.empty())[0][0]


def dense(leaf):
    """A weight of one device in plain numbers."""
    if not isinstance(leaf, Scaled):
        return leaf
    codes = np.asarray(leaf.codes, np.float32)
    codes = codes.T if leaf.inputs_first else codes
    scales, minima = (0 if a is None else np.asarray(a).T[..., None] for a in (leaf.scales, leaf.minima))
    return jnp.asarray((codes.reshape(leaf.outputs, len(leaf.scales), -1) * scales - minima).reshape(leaf.shape))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama"
    for tied in (False, True):
        model, _ = find_model(LLAMA)
        write_checkpoint(model, LLAMA | {"tie_word_embeddings": tied}, path / str(tied))
    return path


def is_scaled(leaf):
    return isinstance(leaf, Scaled)


@pytest.mark.parametrize(("quantization", "tied"), [("q8_0", False), ("q4_0", True)])
def test_a_divided_model_is_the_same_model(checkpoint, quantization, tied):
    path = checkpoint / str(tied)
    single, said = loaded(path, None, quantization)
    assert all(is_scaled(leaf) for leaf in leaves_of(single.params) if leaf.shape != (128,)), said
    want = logits(single)
    plain = jax.tree.map(dense, single.params, is_leaf=is_scaled)
    np.testing.assert_allclose(want, logits(single, plain), atol=1e-5 * np.abs(want).max())
    for mesh, cut in (("1x2", False), ("1x4", True)):
        found, said = loaded(path, mesh, quantization)
        got = logits(found)[:, : LLAMA["vocab_size"]]
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
        block = found.params["blocks"][0]
        plain = [name for name, leaf in block.items() if len(leaf.shape) > 1 and not is_scaled(leaf)]
        assert plain == (["down"] if cut else [])
        assert any("1 matrices become plain numbers" in line for line in said) == cut
        shares = bytes_per_device(block["gate"]) * int(mesh[-1])
        assert shares == bytes_per_device(single.params["blocks"][0]["gate"])


def test_a_gguf_file_is_divided_as_it_is(tmp_path):
    path = write_model(tmp_path / "m.gguf", kind="Q4_1")
    single, _ = loaded(path, None)
    want = logits(single)
    found, _ = loaded(path, "1x2")
    got = logits(found)[:, : want.shape[1]]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    gate = found.params["blocks"][0]["gate"]
    assert is_scaled(gate) and gate.codes.dtype == jnp.uint4 and gate.minima is not None
    assert gate.codes.sharding.shard_shape(gate.codes.shape) == (32, 32)
    # A group of the output projection's inputs is both heads'.
    assert not is_scaled(found.params["blocks"][0]["o"])
