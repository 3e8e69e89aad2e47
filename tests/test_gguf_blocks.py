"""Every block format in a whole model: log-probabilities against llama.cpp's, from files that are made here."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_blocks import TYPES, write_random_model

from jaxserve import attention, native, quant
from jaxserve.models import find_model
from jaxserve.weights import open_checkpoint
from jaxserve.weights.load import load_params

GOLDENS = Path(__file__).parent / "goldens" / "gguf_blocks"


def scored(path, prompts, pack=None, max_positions=None):
    """float32 [prompts, V]: log-probabilities of what follows each prompt."""
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    if max_positions is not None:
        config = replace(config, max_positions=max_positions)
    params = load_params(
        model, config, checkpoint, dtype=np.float32, device_put=lambda a, spec: jax.device_put(a), pack=pack
    )

    @jax.jit
    def run(params, tokens):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden, _ = model.forward(params, config, tokens, positions, jnp.zeros(()), attention.dense)
        return jax.nn.log_softmax(model.logits(params, config, hidden)[-1])

    return np.stack([run(params, jnp.asarray(tokens, jnp.int32)) for tokens in prompts])


@pytest.mark.parametrize("name", TYPES)
def test_log_probabilities_equal_llama_cpps(tmp_path, name):
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    path = tmp_path / f"{name}.gguf"
    assert write_random_model(path, name) == golden["tensors_sha256"], "not the weights that the golden is of"
    exact, rounded = np.asarray(golden["exact"]), np.asarray(golden["logprobs"])
    assert np.abs(scored(path, golden["prompts"]) - exact).max() < 1e-4
    try:
        native.load()
    except native.BuildError as error:
        pytest.skip(f"the kernels are not there: {error}")
    # The kernels round activations to bytes, as llama.cpp's do; they lie about as far from the truth.
    ours = scored(path, golden["prompts"], pack=lambda w, spec: quant.pack(w, spec.shape, np.float32)) - exact
    theirs = rounded - exact
    assert 0 < np.sqrt(np.mean(ours**2)) < 1.5 * np.sqrt(np.mean(theirs**2))
    assert np.abs(ours).max() < 1.5 * np.abs(theirs).max()
