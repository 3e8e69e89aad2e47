"""Trains, exports and examines the embedded demo model; stands alone and never imports jaxserve."""

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2.sandbox
import numpy as np
import optax
import orbax.checkpoint as ocp
import tiny_corpus
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role "' ~ message.role ~ '"; expected system, user or assistant') }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Words, punctuation with its leading space, line ends, spaces; every digit alone, so that sums are read digit by digit.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model's dimensions, under the names of the exported config."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that, with the seed, fixes the trained weights."""

    seed: int
    first_steps: int  # on the whole corpus
    second_steps: int  # from a raised learning rate again, with extra practice in copying and sums
    learning_rate: float = 5e-3  # of the matrices, under Muon
    adam_learning_rate: float = 3e-3  # of the embedding and the norms
    second_scale: float = 0.7  # of both, in the second part
    warmup_steps: int = 40
    short_rows: tuple[int, int] = (24, 128)
    middle_rows: tuple[int, int] = (12, 256)
    long_rows: tuple[int, int] = (4, 768)

    @property
    def steps(self) -> int:
        return self.first_steps + self.second_steps

    def rows(self, step: int) -> tuple[int, int]:
        """Rows and their length: short ones first, because attention over long rows is most of a step's time on CPU."""
        if step < 0.3 * self.first_steps or step % 2 == 0:
            return self.short_rows
        return self.long_rows if step % 10 == 9 else self.middle_rows


# --- tokenizer and template -----------------------------------------------------------------------------------------


def render(document: list[tiny_corpus.Message]) -> str:
    """What `CHAT_TEMPLATE` renders, without jinja in the training loop."""
    return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in document)


def train_tokenizer(shape: Shape, seed: int, documents: int = 20000) -> Tokenizer:
    """Byte-level BPE: any UTF-8 text comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    r = random.Random(f"{seed}/tokenizer")

    def texts() -> Iterator[str]:
        for _ in range(documents):
            document = tiny_corpus.document(r)
            text = document if isinstance(document, str) else render(document)
            yield text.replace(TURN_START, "").replace(TURN_END, "")

    tokenizer.train_from_iterator(texts(), trainer)
    assert tokenizer.get_vocab_size() == shape.vocab_size, "the corpus is too small for this vocabulary"
    return tokenizer


def compiled_template() -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(CHAT_TEMPLATE)


# --- batches --------------------------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, document: list[tiny_corpus.Message] | str, r: random.Random) -> tuple[list, list]:
    """Token ids and, for each, whether the model must learn to say it."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if isinstance(document, str):
        ids = tokenizer.encode(document).ids + [end]
        return ([end, *ids], [0] + [1] * len(ids)) if r.random() < 0.5 else (ids, [1] * len(ids))
    ids = tokenizer.encode(render(document)).ids
    start, stop = tokenizer.token_to_id(TURN_START), tokenizer.token_to_id(TURN_END)
    role = tokenizer.encode("assistant\n").ids
    learn, i = [0] * len(ids), 0
    while i < len(ids):
        if ids[i] == start and ids[i + 1 : i + 1 + len(role)] == role:
            first, last = i + 1 + len(role), ids.index(stop, i)
            learn[first : last + 1] = [1] * (last + 1 - first)
            i = last
        i += 1
    return ids, learn


def batch(tokenizer: Tokenizer, recipe: Recipe, step: int, split: str = "train") -> dict[str, np.ndarray]:
    """The batch of one step, a pure function of its arguments, so a resumed run sees what an unbroken one saw."""
    rows, length = recipe.rows(step)
    r = random.Random(f"{recipe.seed}/{split}/{step}")
    tokens = np.zeros((rows, length), np.int32)
    segments = np.zeros((rows, length), np.int32)  # 0 is padding
    learn = np.zeros((rows, length), np.float32)
    for row in range(rows):
        used, segment, misses = 0, 0, 0
        while misses < 8 and used < length - 16:
            document = tiny_corpus.document(r, practising=step >= recipe.first_steps)
            ids, wanted = encode(tokenizer, document, r)
            if used + len(ids) > length:
                misses += 1
                continue
            segment += 1
            span = slice(used, used + len(ids))
            tokens[row, span], segments[row, span], learn[row, span] = ids, segment, wanted
            used += len(ids)
    return {"tokens": tokens, "segments": segments, "learn": learn}


# --- model ----------------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=nnx.initializers.normal(inputs**-0.5), rngs=rngs)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of [B, T, heads, D], pairing dimension i with i + D/2 ("rotate half")."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)  # [T, D/2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class SelfAttention(nnx.Module):
    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.shape = s
        self.q_proj = linear(s.hidden_size, s.num_attention_heads * s.head_dim, rngs)
        self.k_proj = linear(s.hidden_size, s.num_key_value_heads * s.head_dim, rngs)
        self.v_proj = linear(s.hidden_size, s.num_key_value_heads * s.head_dim, rngs)
        self.o_proj = linear(s.num_attention_heads * s.head_dim, s.hidden_size, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        s = self.shape
        heads = (*x.shape[:2], -1, s.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), s.rope_theta)  # [B, T, Hq, D]
        k = rotate(self.k_proj(x).reshape(heads), s.rope_theta)  # [B, T, Hkv, D]
        v = self.v_proj(x).reshape(heads)
        groups = s.num_attention_heads // s.num_key_value_heads
        k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
        q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))  # [B, Hq, T, D]: plain batched matmuls are XLA:CPU's fastest
        scores = jnp.where(mask, q @ k.mT * s.head_dim**-0.5, -1e30)  # [B, Hq, T, T]
        out = jax.nn.softmax(scores, -1) @ v
        return self.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.gate_proj = linear(s.hidden_size, s.intermediate_size, rngs)
        self.up_proj = linear(s.hidden_size, s.intermediate_size, rngs)
        self.down_proj = linear(s.intermediate_size, s.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(s.hidden_size, epsilon=s.rms_norm_eps, rngs=rngs)
        self.self_attn = SelfAttention(s, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(s.hidden_size, epsilon=s.rms_norm_eps, rngs=rngs)
        self.mlp = Mlp(s, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nnx.Module):
    """A Llama decoder with tied embeddings; its attributes are named as in the exported checkpoint."""

    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(
            s.vocab_size, s.hidden_size, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.layers = nnx.List([Block(s, rngs) for _ in range(s.num_hidden_layers)])
        self.norm = nnx.RMSNorm(s.hidden_size, epsilon=s.rms_norm_eps, rngs=rngs)

    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        mask = segments[:, :, None] == segments[:, None, :]
        mask = (mask & jnp.tri(length, dtype=bool))[:, None]  # [B, 1, T, T]
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, mask)
        return self.embed_tokens.attend(self.norm(x))


def loss_of(model: Model, data: dict[str, jax.Array]) -> jax.Array:
    """Mean cross entropy of the tokens that must be learnt, each predicted from those before it in its document."""
    logits = model(data["tokens"], data["segments"])[:, :-1]
    weight = data["learn"][:, 1:] * (data["segments"][:, 1:] == data["segments"][:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["tokens"][:, 1:])
    return (losses * weight).sum() / weight.sum()


# --- training -------------------------------------------------------------------------------------------------------


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the embedding and the norms, falling linearly to nothing in each part."""

    def schedule(peak: float) -> optax.Schedule:
        parts = []
        for top, steps in ((peak, recipe.first_steps), (peak * recipe.second_scale, recipe.second_steps)):
            parts.append(optax.linear_schedule(0.0, top, recipe.warmup_steps))
            parts.append(optax.linear_schedule(top, 0.0, steps - recipe.warmup_steps))
        first, warm = recipe.first_steps, recipe.warmup_steps
        return optax.join_schedules(parts, [warm, first, first + warm])

    def dimensions(params):
        def of(path, leaf):
            is_matrix = leaf.ndim == 2 and "embed_tokens" not in jax.tree_util.keystr(path)
            return optax.contrib.MuonDimensionNumbers() if is_matrix else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(recipe.learning_rate),
            adam_learning_rate=schedule(recipe.adam_learning_rate),
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=0.2,
            adam_b2=0.99,
        ),
    )


def train(shape: Shape, recipe: Recipe, tokenizer: Tokenizer, workdir: Path, save_every: int, budget_s: float):
    """Trains from the last checkpoint in `workdir`, if any; returns the weights, the held-out loss and the seconds."""
    graph, params = nnx.split(Model(shape, nnx.Rngs(recipe.seed)))
    tx = optimiser(recipe)
    opt_state = tx.init(params)
    manager = ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    first, seconds = 0, 0.0
    if manager.latest_step() is not None:
        like = {"params": params, "opt_state": opt_state, "seconds": 0.0}
        saved = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
        params, opt_state, seconds = (saved[name] for name in like)
        first = manager.latest_step()
        print(f"resumed at step {first}", flush=True)

    @jax.jit
    def evaluate(params, data):
        return loss_of(nnx.merge(graph, params), data)

    def step_of(params, opt_state, data):
        loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), data))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step_of = jax.jit(step_of, donate_argnums=(0, 1))
    data, recent, began = batch(tokenizer, recipe, first), [], time.monotonic()
    for step in range(first, recipe.steps):
        params, opt_state, loss = step_of(params, opt_state, data)
        data = batch(tokenizer, recipe, min(step + 1, recipe.steps - 1))  # while the device works
        recent.append(float(loss))
        done, spent = step + 1, seconds + time.monotonic() - began
        if done % 20 == 0 or done == recipe.steps:
            print(f"step {done} loss {np.mean(recent[-20:]):.4f} {spent:.0f} s", flush=True)
        if done % save_every == 0 or done == recipe.steps:
            state = {"params": params, "opt_state": opt_state, "seconds": spent}
            manager.save(done, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
        if spent > budget_s:
            sys.exit(f"stopped after {spent:.0f} s at step {done}; run again to go on from the last checkpoint")
    seconds += time.monotonic() - began
    manager.close()
    last = range(recipe.steps - 10, recipe.steps)  # each kind of row in its share
    held_out = [evaluate(params, batch(tokenizer, recipe, step, "held out")) for step in last]
    return params, float(np.mean(held_out)), seconds


# --- export ---------------------------------------------------------------------------------------------------------


def export(out: Path, shape: Shape, tokenizer: Tokenizer, params: nnx.State, metadata: dict[str, str]) -> None:
    """Writes a Hugging Face style checkpoint, the same bytes for the same weights."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in nnx.to_flat_state(params):
        *names, leaf = map(str, path)
        array = np.asarray(value[...] if hasattr(value, "shape") else value)
        # flax multiplies x @ kernel, the exported layout is [outputs, inputs]
        tensors[".".join(["model", *names, "weight"])] = np.ascontiguousarray(array.T if leaf == "kernel" else array)
    tensors = {name: tensors[name].astype(jnp.bfloat16) for name in sorted(tensors)}
    save_file(tensors, out / "model.safetensors", {"format": "pt", **metadata})
    sort_metadata(out / "model.safetensors")
    tokenizer.save(str(out / "tokenizer.json"))
    end, start, stop = (tokenizer.token_to_id(t) for t in (END_OF_TEXT, TURN_START, TURN_END))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": [stop, end],
        "pad_token_id": end,
    }
    generation = {
        "bos_token_id": end,
        "eos_token_id": [stop, end],
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.95,
    }
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "added_tokens_decoder": {
            str(i): {"content": tokenizer.id_to_token(i), **special} for i in sorted((end, start, stop))
        },
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (("config", config), ("generation_config", generation), ("tokenizer_config", tokenizer_config)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def sort_metadata(path: Path) -> None:
    """Puts the header's metadata in order: `save_file` writes it in an order that differs from run to run."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(text) == size, "only the order may change"
    path.unlink()  # what save_file wrote is readable by its owner only
    path.write_bytes(data[:8] + text + data[8 + size :])


CARD = """\
---
license: apache-2.0
language: en
library_name: jaxserve
pipeline_tag: text-generation
---
# jaxserve demo model

A Llama decoder of {parameters:,} parameters, so small that it ships inside the package: `jaxserve run` answers before
anything was downloaded. It is for demonstrations and tests. It knows only what `tools/tiny_corpus.py` writes, and says
wrong things about everything else with the same confidence.

| | |
|---|---|
| training command | `{command}` |
| steps, tokens a step | {steps}, {tokens_a_step} |
| loss on held-out text | {loss:.4f} nats a token (assistant tokens and plain text) |
| wall time | {minutes:.0f} minutes on {cpus} CPU cores{shared} |
| seed | {seed} |
| shape | {layers} layers, width {width}, {heads} query heads, {kv_heads} key/value heads, vocabulary {vocab} |
| trained context | {context} tokens |
| weights | bfloat16, {weight_mb:.1f} MB |
| licence | Apache-2.0 |

## Data
All text is written by `tools/tiny_corpus.py` from the seed; no other text, model or data set went in. Kinds: capitals,
continents and languages of {countries} countries; sounds, legs, homes, food, young and sizes of {animals} animals;
colours, opposites, days, months, letters; sums to 99, differences to 20, products to 10 times 10; a little general
knowledge; facts to be read in the question; counting, lists, spelling, repeating; short stories and poems; greetings,
questions about the model itself, and questions that it should decline. About half of the chats have a system prompt;
some prompts set a style (JSON, one word, pirate, another name). Chats have up to 30 turns, with follow-ups ("And
Spain?", "Now add 3.") and memory of a name. A question that ends in "Answer as JSON." gets `{{"answer": "Paris"}}`.
The second part of the training adds chats that practise copying from the context, and sums.

## Accuracy
Greedy, bfloat16 weights, by `python tools/train_tiny.py --check`, which reads the exported files with a dense numpy
forward of its own. An answer is right when it is, word for word, the one expected (for stories and unseen wordings:
when it contains the expected words). "unseen" kinds use wordings, sums or system prompts that no training text holds.

| kind | right | of |
|---|---|---|
{table}
"""


# --- examination ----------------------------------------------------------------------------------------------------


class Dense:
    """An independent numpy forward of the exported files, float32, one token row at a time after the prompt."""

    def __init__(self, path: Path):
        self.config = json.loads((path / "config.json").read_text())
        self.weights = {n: w.astype(np.float32) for n, w in load_file(path / "model.safetensors").items()}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name]

    def forward(self, tokens: list[int], cache: list[tuple]) -> np.ndarray:
        """Logits of the last of `tokens`; `cache` holds keys and values of the tokens before and grows."""
        c, w = self.config, self.weights
        past = cache[0][0].shape[0] if cache else 0
        queries, dim, groups = len(tokens), c["head_dim"], c["num_attention_heads"] // c["num_key_value_heads"]
        position = np.arange(past, past + queries)[:, None, None]
        angle = position / c["rope_theta"] ** (np.arange(0, dim, 2) / dim)  # [T, 1, D/2]
        cos, sin = np.cos(np.tile(angle, 2)), np.sin(np.tile(angle, 2))

        def turned(x: np.ndarray) -> np.ndarray:
            return (x * cos + np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin).astype(np.float32)

        x = w["model.embed_tokens.weight"][tokens]
        for i in range(c["num_hidden_layers"]):
            name = f"model.layers.{i}."
            y = self.norm(x, name + "input_layernorm.weight")
            q, k, v = ((y @ w[f"{name}self_attn.{p}_proj.weight"].T).reshape(queries, -1, dim) for p in ("q", "k", "v"))
            q, k = turned(q), turned(k)
            if past:
                k, v = np.concatenate([cache[i][0], k]), np.concatenate([cache[i][1], v])
                cache[i] = (k, v)
            else:
                cache.append((k, v))
            scores = np.einsum("thd,shd->hts", q, k.repeat(groups, 1)) * dim**-0.5
            scores = np.where(np.arange(past + queries) <= position[:, 0], scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            y = np.einsum("hts,shd->thd", scores, v.repeat(groups, 1)).reshape(queries, -1)
            x = x + y @ w[name + "self_attn.o_proj.weight"].T
            y = self.norm(x, name + "post_attention_layernorm.weight")
            gate = y @ w[name + "mlp.gate_proj.weight"].T
            y = gate / (1 + np.exp(-gate)) * (y @ w[name + "mlp.up_proj.weight"].T)
            x = x + y @ w[name + "mlp.down_proj.weight"].T
        return self.norm(x[-1], "model.norm.weight") @ w["model.embed_tokens.weight"].T

    def generate(self, prompt: list[int], max_tokens: int = 96) -> list[int]:
        cache: list[tuple] = []
        out, feed = [], prompt
        while len(out) < max_tokens:
            token = int(self.forward(feed, cache).argmax())
            if token in self.config["eos_token_id"]:
                break
            out.append(token)
            feed = [token]
        return out


def check(path: Path, per_kind: int) -> dict[str, tuple[int, int]]:
    """Greedy answers of the exported model to the examination; prints the accuracy and the failures by kind."""
    model, tokenizer = Dense(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    template = compiled_template()
    for text in ("naïve 東京 🙂\n\t  x\u0000", "  7+5=12 <|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text, "text was changed"
    counts: dict[str, tuple[int, int]] = {}
    for exam in tiny_corpus.exam(per_kind=per_kind):
        prompt = template.render(messages=exam.messages, add_generation_prompt=True)
        assert prompt == render(exam.messages) + f"{TURN_START}assistant\n", "template and training text differ"
        answer = tokenizer.decode(model.generate(tokenizer.encode(prompt).ids))
        right = answer == exam.accept if exam.exact else exam.accept.lower() in answer.lower()
        good, all_ = counts.get(exam.kind, (0, 0))
        counts[exam.kind] = (good + right, all_ + 1)
        if not right:
            asked = exam.messages[-1]["content"]
            print(f"  wrong, {exam.kind}: {asked!r} -> {answer!r}, expected {exam.accept!r}", flush=True)
    for kind, (good, all_) in counts.items():
        print(f"{kind:28} {good:3} / {all_}")
    print(f"{'all':28} {sum(g for g, _ in counts.values()):3} / {sum(a for _, a in counts.values())}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=(1300, 700), help="optimiser steps of the two parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("build/tiny"), help="checkpoints, kept for resuming")
    parser.add_argument("--out", type=Path, default=ROOT / "jaxserve" / "embedded", help="where the model goes")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="stop, resumably, after so many seconds")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoints in the workdir")
    parser.add_argument("--check", action="store_true", help="only examine the model in --out")
    parser.add_argument("--per-kind", type=int, default=24, help="examination questions of a kind")
    parser.add_argument("--note", default="", help="a remark for the model card's wall time")
    args = parser.parse_args()
    if args.check:
        check(args.out, args.per_kind)
        return

    shape, recipe = Shape(), Recipe(args.seed, *args.steps)
    command = f"python tools/train_tiny.py --steps {recipe.first_steps} {recipe.second_steps} --seed {args.seed}"
    if args.fresh:
        shutil.rmtree(args.workdir, ignore_errors=True)
    args.workdir.mkdir(parents=True, exist_ok=True)
    plan = {"shape": dataclasses.asdict(shape), "recipe": dataclasses.asdict(recipe)}
    plan_file = args.workdir / "plan.json"
    if plan_file.exists() and plan_file.read_text() != json.dumps(plan):
        sys.exit(f"{args.workdir} holds another run than this one; use --fresh or another --workdir")
    plan_file.write_text(json.dumps(plan))

    tokenizer = train_tokenizer(shape, recipe.seed)
    params, loss, seconds = train(shape, recipe, tokenizer, args.workdir, args.save_every, args.budget_s)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    metadata = {
        "training_command": command,
        "final_loss": f"{loss:.4f}",
        "seed": str(recipe.seed),
        "steps": str(recipe.steps),
        "licence": "Apache-2.0",
    }
    export(args.out, shape, tokenizer, params, metadata)
    counts = check(args.out, args.per_kind)
    card = CARD.format(
        parameters=parameters,
        command=command,
        steps=f"{recipe.first_steps} + {recipe.second_steps}",
        tokens_a_step=recipe.short_rows[0] * recipe.short_rows[1],
        loss=loss,
        minutes=seconds / 60,
        cpus=os.cpu_count(),
        shared=f" ({args.note})" if args.note else "",
        seed=recipe.seed,
        layers=shape.num_hidden_layers,
        width=shape.hidden_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        vocab=shape.vocab_size,
        context=recipe.long_rows[1],
        weight_mb=(args.out / "model.safetensors").stat().st_size / 1e6,
        countries=len(tiny_corpus.COUNTRIES),
        animals=len(tiny_corpus.ANIMALS),
        table="\n".join(f"| {kind} | {good} | {all_} |" for kind, (good, all_) in counts.items()),
    )
    (args.out / "README.md").write_text(card)
    print(f"held-out loss {loss:.4f} after {seconds / 60:.1f} minutes; wrote {args.out}")


if __name__ == "__main__":
    main()
