"""Choosing tokens and their log-probabilities for CPU in C++; see csrc/sampling.cc."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt


def sample(
    logits: Float[Array, "S V"],
    temperature: Float[Array, " S"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    min_p: Float[Array, " S"],
    seed: UInt[Array, "S 2"],
    position: Int[Array, " S"],
) -> Int[Array, " S"]:
    """One id a row: the best where the temperature is 0, else drawn as jaxserve.sampling says, by the same noise.

    `jaxserve.native.load` must have been called, as for all of this module. A row depends on its own arguments alone,
    bit for bit. A row with a NaN gives the place of its first one.
    """
    call = jax.ffi.ffi_call("jaxserve_sample", jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32))
    tokens: jax.Array = call(logits, temperature, top_k, top_p, min_p, seed, position)
    return tokens


def token_logprobs(
    logits: Float[Array, "S V"], tokens: Int[Array, " S"], top: int
) -> tuple[Float[Array, " S"], Int[Array, " S"], Int[Array, "S K"], Float[Array, "S K"]]:
    """Log-probability and rank of `tokens`, ids and log-probabilities of the `top` best; zeros for tokens of -1."""
    rows = logits.shape[0]
    results = (
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, top), jnp.int32),
        jax.ShapeDtypeStruct((rows, top), jnp.float32),
    )
    logprob, rank, ids, logprobs = jax.ffi.ffi_call("jaxserve_token_logprobs", results)(logits, tokens)
    return logprob, rank, ids, logprobs
