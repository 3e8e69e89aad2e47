"""What tests/test_scaled.py runs in a process of four CPU devices: quantised weights that are divided are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import EXPERTS, model_tensors, write_model

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

QWEN = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
    "vocab_size": 2050, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None, "v_head_dim": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 0, "vocab_size": 2050,
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "topk_method": "greedy", "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
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
    arrays = [None if a is None else np.asarray(a, np.float32) for a in (leaf.codes, leaf.scales, leaf.minima)]
    arrays = [a if a is None or leaf.stacked else a[None] for a in arrays]
    count = leaf.shape[0] if leaf.stacked else 1
    found = [_matrix(leaf, *(None if a is None else a[i] for a in arrays)) for i in range(count)]
    return jnp.asarray(np.stack(found).reshape(leaf.shape))


def _matrix(leaf, codes, scales, minima):
    """Without what fills up a stack's."""
    count = leaf.depth // leaf.format.group
    codes = (codes.T if leaf.inputs_first else codes)[: leaf.outputs]
    scales, minima = (0 if a is None else a.T[: leaf.outputs, :count, None] for a in (scales, minima))
    return codes.reshape(leaf.outputs, count, -1) * scales - minima


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


def same(got, want):
    """Logits, and so the tokens that they choose."""
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert (got.argmax(-1) == want.argmax(-1)).all()


MIXTURES = {
    # Each of two devices has 96 of an expert's features, which are three groups; each of four 48, which cut one.
    "qwen": (QWEN, "q4_0", {"expert=2,model=2": [], "1x4": ["down"]}),
    "deepseek": (DEEPSEEK, "q8_0", {"expert=2,model=2": []}),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_divided_experts_are_the_same_experts(name, tmp_path):
    config, quantization, meshes = MIXTURES[name]
    write_checkpoint(find_model(config)[0], config, tmp_path / "m")
    single, said = loaded(tmp_path / "m", None, quantization)
    block = single.params["blocks"][0]
    stacks = {key: leaf for key, leaf in block.items() if key in ("gate", "up", "down")}
    assert all(is_scaled(leaf) and leaf.stacked for leaf in stacks.values()), said
    want = logits(single)
    same(want, logits(single, jax.tree.map(dense, single.params, is_leaf=is_scaled)))
    for mesh, plain in meshes.items():
        found, said = loaded(tmp_path / "m", mesh, quantization)
        same(logits(found)[:, : config["vocab_size"]], want)
        block = found.params["blocks"][0]
        assert [key for key in stacks if not is_scaled(block[key])] == plain
        if name == "deepseek":
            assert all(is_scaled(leaf) for leaf in leaves_of(block["shared"]))
        if name == "qwen":  # 192 features fill up 256 places, and so do two times 96
            assert (4 if plain == [] else 2) * bytes_per_device(block["gate"]) == bytes_per_device(stacks["gate"])


def test_experts_of_a_gguf_file_are_divided_as_they_are(tmp_path):
    keys = {f"qwen3moe.{key}": value for key, value in (EXPERTS | {"expert_feed_forward_length": 64}).items()}
    tensors = model_tensors("qwen3moe", experts=True)
    path = write_model(tmp_path / "m.gguf", "qwen3moe", tensors=tensors, metadata=keys, kind="Q4_1")
    single, _ = loaded(path, None)
    want = logits(single)
    same(want, logits(single, jax.tree.map(dense, single.params, is_leaf=is_scaled)))
    found, _ = loaded(path, "1x2")
    same(logits(found)[:, : want.shape[1]], want)
    down = found.params["blocks"][0]["down"]
    assert is_scaled(down) and down.codes.sharding.shard_shape(down.codes.shape) == (3, 32, 128)
