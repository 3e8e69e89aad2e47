"""GPT-2 as a flax.nnx module: learned positions, LayerNorm, biases, one projection for q, k and v.

    jaxserve check examples/gpt2_nnx.py
    jaxserve serve openai-community/gpt2 --model-code examples/gpt2_nnx.py

T tokens in the step, S sampled rows, D width, N heads, H head_dim, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.from_nnx import from_nnx
from jaxserve.spec import Attend, Cache, only_served
from jaxserve.taps import tap

EXAMPLE = {
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 2,
    "n_embd": 48,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 2048,
}


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    eps: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, activation_function="gelu_new", tie_word_embeddings=True, scale_attn_weights=True)
        only_served(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        width, heads = hf["n_embd"], hf["n_head"]
        return cls(
            layers=hf["n_layer"],
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            ffn=hf.get("n_inner") or 4 * width,
            vocab=hf["vocab_size"],
            max_positions=hf["n_positions"],
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )


class Block(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.c = c
        self.ln_1 = nnx.LayerNorm(c.width, epsilon=c.eps, rngs=rngs)
        self.c_attn = nnx.Linear(c.width, 3 * c.width, rngs=rngs)
        self.attn_proj = nnx.Linear(c.width, c.width, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(c.width, epsilon=c.eps, rngs=rngs)
        self.c_fc = nnx.Linear(c.width, c.ffn, rngs=rngs)
        self.mlp_proj = nnx.Linear(c.ffn, c.width, rngs=rngs)

    def __call__(
        self, layer: int, x: Float[Array, "T D"], cache: Cache, attend: Attend
    ) -> tuple[Float[Array, "T D"], Cache]:
        heads = (x.shape[0], self.c.heads, self.c.head_dim)
        q, k, v = (a.reshape(heads) for a in jnp.split(self.c_attn(self.ln_1(x)), 3, axis=-1))  # [T, N, H]
        o, cache = attend(layer, q, k, v, cache)  # [T, N, H]
        x = x + tap(self.attn_proj(o.reshape(x.shape)), f"layers.{layer}.attention")
        mlp = self.mlp_proj(jax.nn.gelu(self.c_fc(self.ln_2(x)), approximate=True))
        x = x + tap(mlp, f"layers.{layer}.mlp")
        return tap(x, f"layers.{layer}.block"), cache


class GPT2(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.wte = nnx.Embed(c.vocab, c.width, rngs=rngs)
        self.wpe = nnx.Embed(c.max_positions, c.width, rngs=rngs)
        self.h = nnx.List([Block(c, rngs=rngs) for _ in range(c.layers)])
        self.ln_f = nnx.LayerNorm(c.width, epsilon=c.eps, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"], cache: Cache, attend: Attend
    ) -> tuple[Float[Array, "T D"], Cache]:
        x = tap(self.wte(tokens) + self.wpe(positions), "embed")  # [T, D]
        for i, block in enumerate(self.h):
            x, cache = block(i, x, cache, attend)
        return self.ln_f(x), cache

    def logits(self, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        table = self.wte.embedding[...]  # the embeddings are tied
        return jnp.einsum("sd,vd->sv", hidden, table, preferred_element_type=jnp.float32)


NAMES = {
    "embedding": "weight",
    "scale": "weight",
    "kernel": "weight",  # [inputs, outputs] in the checkpoint, too: elsewhere a from_nnx.Kernel would say otherwise
    "c_attn": "attn.c_attn",
    "attn_proj": "attn.c_proj",
    "c_fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}


def names(path: str) -> str:
    """The published checkpoint's name of a parameter: `h.0.attn_proj.kernel` is `h.0.attn.c_proj.weight` there."""
    return ".".join(NAMES.get(part, part) for part in path.split("."))


def unused(name: str) -> bool:
    """The causal masks that the published checkpoints hold."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


Config, param_specs, forward, logits = from_nnx(Config, GPT2, names)  # type: ignore[misc]
