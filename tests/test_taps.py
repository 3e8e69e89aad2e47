"""Inner values of models: found under their names, right, each once, and free where nobody asks for them."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from running_engine import Running, request
from test_models import GOLDENS, load
from toy_model import VOCAB, write_checkpoint

from jaxserve import LLM, attention, captured, models, sizing
from jaxserve.config import EngineOptions, HostPlace
from jaxserve.errors import ConfigError, PromptTooLong
from jaxserve.hub import resolve_model
from jaxserve.models import find_model, llama
from jaxserve.request import TapInfo
from jaxserve.spec import Model, weight
from jaxserve.taps import find_taps, tap, with_values
from jaxserve.weights import open_checkpoint

ROOT = Path(__file__).parent.parent
FAMILIES = [next(p for p in GOLDENS if name in (p / "config.json").read_text()) for name in models.ARCHITECTURES]
EXAMPLES = {"gpt_neox": "gpt_neox.py", "gpt2": "gpt2_nnx.py"}


def values_of(model, config, params, tokens, patterns=("*",)):
    """What the taps have for a prompt, by name, without an engine; and what forward gives."""
    taps = find_taps(model, config, np.float32, patterns)

    @jax.jit
    def run(params, tokens, positions):
        def forward(tokens, positions, cache):
            return model.forward(params, config, tokens, positions, cache, attention.dense)

        hidden, _, values = with_values(forward, taps, tokens, positions, jnp.zeros(()))
        return hidden, values

    hidden, values = run(params, jnp.asarray(tokens, jnp.int32), jnp.arange(len(tokens), dtype=jnp.int32))
    return {tap.name: np.asarray(value) for tap, value in zip(taps, values, strict=True)}, np.asarray(hidden)


def names_of(layers):
    inner = [f"layers.{i}.{part}" for i in range(layers) for part in ("attention", "mlp", "block")]
    return ["embed", *inner, "hidden"]


# --- which values there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.name)
def test_each_family_has_the_same_names(path):
    model, config = find_model(json.loads((path / "config.json").read_text()))
    taps = find_taps(model, config, np.float32, ["*"])
    assert [tap.name for tap in taps] == names_of(config.layers)
    assert {(tap.shape, tap.dtype) for tap in taps} == {((config.width,), "float32")}


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite"])
def test_the_branches_add_up_to_the_residual_stream(name):
    path = ROOT / "tests" / "goldens" / name
    model, config, params = load(path)
    values, hidden = values_of(model, config, params, np.load(path / "golden.npz")["tokens"][0][:8])
    stream = values["embed"]
    for i in range(config.layers):
        stream = stream + values[f"layers.{i}.attention"] + values[f"layers.{i}.mlp"]
        np.testing.assert_allclose(values[f"layers.{i}.block"], stream, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(values["hidden"], hidden)


@pytest.mark.parametrize("name", EXAMPLES)
def test_so_do_those_of_the_examples(name):
    path = ROOT / "tests" / "goldens" / "examples" / name
    model, config = find_model(open_checkpoint(path).config, str(ROOT / "examples" / EXAMPLES[name]))
    assert [tap.name for tap in find_taps(model, config, np.float32, ["*"])] == names_of(config.layers)


def test_encoders_have_them_too():
    path = ROOT / "tests" / "goldens" / "embeddings" / "bert"
    model, config = find_model(json.loads((path / "config.json").read_text()))
    assert [tap.name for tap in find_taps(model, config, np.float32, ["*"])] == names_of(config.layers)


# --- a model of one's own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    layers: int = 2
    width: int = 3
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 3
    vocab: int = 5
    max_positions: int = 16


def own(forward, logits=lambda p, c, hidden: jnp.tile(hidden[:, :1], (1, c.vocab))):
    specs = {"one": weight(Config(), "width", "one")}
    return Model("mine", lambda hf: Config(), lambda c: specs, forward, logits)


def marked(inner):
    """A model whose forward is `inner(x [T, 3], layer) -> x` for two layers."""

    def forward(p, c, tokens, positions, cache, attend):
        x = tokens.astype(jnp.float32)[:, None] * p["one"][None, :]
        for layer in range(2):
            x = inner(x, layer)
        return x, cache

    return own(forward)


def got(model, patterns=("*",)):
    values, _ = values_of(model, Config(), {"one": jnp.array([1.0, 2.0, 3.0])}, [1, 2], patterns)
    return {name: value[:, 0].tolist() for name, value in values.items()}


def test_marks_are_found_through_jit_and_checkpoint():
    @partial(jax.jit, static_argnums=1)
    def twice(x, layer):
        return checkpoint_name(x * 2, f"jit.{layer}") + 1

    def inner(x, layer):
        x = jax.checkpoint(lambda x: tap(x + 10, f"remat.{layer}") * 1)(x)
        return jax.jit(lambda x: twice(x, layer) + tap(x, f"outer.{layer}"))(x)

    x = np.array([1.0, 2.0])
    first = 3 * (x + 10) + 1
    want = {"remat.0": x + 10, "jit.0": 2 * (x + 10), "outer.0": x + 10, "hidden": 3 * (first + 10) + 1}
    want |= {"remat.1": first + 10, "jit.1": 2 * (first + 10), "outer.1": first + 10}
    assert got(marked(inner)) == {name: value.tolist() for name, value in want.items()}
    assert got(marked(inner), ["jit.1", "h*"]) == {name: want[name].tolist() for name in ("jit.1", "hidden")}


def test_a_value_that_nobody_uses_and_one_that_is_an_argument():
    def inner(x, layer):
        tap(x, f"in.{layer}")
        tap(x * 7, f"idle.{layer}")
        return x

    assert got(marked(inner), ["*.0"]) == {"in.0": [1.0, 2.0], "idle.0": [7.0, 14.0]}


def scanned(x, layer):
    return jax.lax.scan(lambda x, _: (tap(x + 1, f"layers.{layer}.step"), None), x, None, length=3)[0]


def branched(x, layer):
    return jax.lax.cond(x[0, 0] > 0, lambda x: tap(x, f"layers.{layer}.step"), lambda x: x, x)


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        (marked(lambda x, layer: x), "layers.*", r"'layers.\*': mine has no such value; it has hidden$"),
        (marked(lambda x, layer: tap(x, f"layers.{layer}.x")), "mlp", r"has layers.\*.x \(2 of them\), hidden$"),
        (marked(lambda x, layer: tap(x, "x")), "x", "'x': mine gives that name to 2 values"),
        (marked(lambda x, layer: tap(x, "hidden")), "hidden", "'hidden': mine gives that name to 3 values"),
        (marked(scanned), "*", "'layers.0.step': mine marks it inside scan, which lets no value out"),
        (marked(branched), "*", "'layers.0.step': mine marks it inside cond"),
        (marked(lambda x, layer: tap(x.T, f"{layer}").T), "0", r"marks a value of \[3, 13\]; its first axis must be"),
        (marked(lambda x, layer: tap(x.sum(), f"{layer}") + x), "0", r"marks a value of \[\]; its first axis"),
        (marked(lambda x, layer: x + jnp.real(tap(x + 0j, f"{layer}"))), "0", "a value of complex64; captured are"),
        (
            own(lambda p, c, t, n, cache, a: (t[:, None] * p["one"][None], cache), lambda p, c, h: tap(h, "scores")),
            "scores",
            "'scores': mine marks it inside logits",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(model, pattern, message):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with pytest.raises(ConfigError, match=message):
            find_taps(model, Config(), np.float32, [pattern])


def test_values_of_every_type_cross_as_bytes():
    def inner(x, layer):
        tap(x.astype(jnp.bfloat16)[:, :, None], f"bf16.{layer}")
        tap(jnp.argmax(x, axis=-1), f"index.{layer}")
        tap(x[:, :2] > 1, f"large.{layer}")
        return x

    taps = find_taps(marked(inner), Config(), np.float32, ["*.1"])
    assert taps == (
        TapInfo("bf16.1", (3, 1), "bfloat16"),
        TapInfo("index.1", (), "int32"),
        TapInfo("large.1", (2,), "bool"),
    )
    assert captured.token_bytes(taps) == 6 + 4 + 2
    values, _ = values_of(marked(inner), Config(), {"one": jnp.array([1.0, 0.3, 3.0])}, [1, 2], ["*.1"])
    back = [captured.values(tap, values[tap.name].tobytes()) for tap in taps]
    assert [(a.shape, a.dtype.name) for a in back] == [((2, 3, 1), "float32"), ((2,), "int32"), ((2, 2), "bool")]
    np.testing.assert_array_equal(back[0], values["bf16.1"].astype(np.float32))
    np.testing.assert_array_equal(back[2], values["large.1"])


# --- what a step costs without them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in an engine that captures all."""
    with Running(resolve_model(None), pages=64, seqs=4, budget=32, length=128, warmup="lazy", capture=["*"]) as engine:
        yield engine


def test_a_step_that_captures_nothing_is_the_program_without_marks(embedded, monkeypatch):
    programs, sizes = embedded.engine.runner.programs, embedded.engine.runner.sizes

    def lowered(programs):
        program = programs.step(max(embedded.engine.runner.shapes), sizes)
        jitted = jax.jit(program.function, donate_argnums=program.donate, out_shardings=program.results)
        return jitted.lower(*program.arguments).as_text()

    off, on = lowered(replace(programs, taps=())), lowered(programs)
    monkeypatch.setattr(llama, "tap", lambda x, name: x)
    assert lowered(replace(programs, taps=())) == off != on
    with pytest.raises(ConfigError, match=r"'embed': it was \[256\] of float32 a token, and is gone now"):
        lowered(programs)


# --- what the engine brings ------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 100, 7, 300], list(range(40, 110)), [8], list(range(1000, 1033))]


def arrays(engine, result):
    taps = engine.engine.info.taps
    return {t.name: captured.values(t, b"".join(p)) for t, p in zip(taps, result.captured, strict=True)}


def test_they_are_what_the_model_computes(embedded):
    path = resolve_model(None)
    prompt = PROMPTS[3]
    result = embedded.one(prompt, max_tokens=6, ignore_eos=True)
    values = arrays(embedded, result)
    model, config, params = load(path)
    want, _ = values_of(model, config, params, [*prompt, *result.tokens[:-1]])
    assert list(values) == names_of(config.layers) == list(want)
    for name in want:  # the engine's kernels, in pieces and steps, against plain XLA on all tokens at once
        np.testing.assert_allclose(values[name], want[name], atol=2e-4 * np.abs(want[name]).max(), err_msg=name)

    # And by hand: the feed-forward from the stream before it, and the next token from the last hidden state.
    p = jax.tree.map(np.asarray, params["blocks"][2])
    x = values["layers.1.block"] + values["layers.2.attention"]
    h = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * p["mlp_norm"]
    gate = h @ p["gate"].T
    mlp = (gate / (1 + np.exp(-gate)) * (h @ p["up"].T)) @ p["down"].T
    np.testing.assert_allclose(values["layers.2.mlp"], mlp, atol=1e-4 * np.abs(mlp).max())
    scores = values["hidden"][len(prompt) - 1 :] @ np.asarray(params["embed"]).T
    assert scores.argmax(axis=-1).tolist() == result.tokens


def test_in_a_crowd_and_in_pieces_they_have_the_same_bits(embedded):
    requests = {str(i): request(str(i), prompt, max_tokens=5, ignore_eos=True) for i, prompt in enumerate(PROMPTS)}
    together = embedded.run(requests)
    for name, one in requests.items():
        alone = embedded.run({name: one})[name, 0]
        assert alone.tokens == together[name, 0].tokens
        for key, values in arrays(embedded, alone).items():
            assert len(values) == len(one.prompt_token_ids) + 4
            np.testing.assert_array_equal(arrays(embedded, together[name, 0])[key], values, err_msg=key)
    whole = arrays(embedded, embedded.run({"0": requests["0"]})["0", 0])["layers.3.block"]
    longer = embedded.one([*PROMPTS[0], *range(50, 80)], max_tokens=1)  # in several steps, of other shapes
    np.testing.assert_array_equal(arrays(embedded, longer)["layers.3.block"][:5], whole[:5])


def test_a_prompt_alone_is_captured_whole(embedded):
    result = embedded.one(PROMPTS[3], max_tokens=0, prompt_logprobs=1)
    assert len(result.prompt_logprobs) == len(PROMPTS[3])
    assert {len(values) for values in arrays(embedded, result).values()} == {len(PROMPTS[3])}
    last = embedded.one(range(3, 131), max_tokens=0)
    assert len(arrays(embedded, last)["hidden"]) == 128
    assert embedded.one(range(3, 132), max_tokens=0).error == PromptTooLong.__name__, "its last token has no place"


def test_each_position_once_whatever_becomes_of_a_sequence(tmp_path, monkeypatch):
    """The toy's hidden state is the token itself. Sequences are preempted, and would share their beginnings."""
    monkeypatch.setitem(models.ARCHITECTURES, "ToyForCausalLM", "toy_model")
    rng = np.random.default_rng(0)
    requests = {}
    for i in range(24):
        prompt = [*range(12), *rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()]
        requests[str(i)] = request(str(i), prompt, max_tokens=int(rng.integers(0, 20)), n=1 + i % 2, temperature=1.0)
    small = {"pages": 20, "length": 64, "seqs": 8, "warmup": "lazy", "decode_steps": 4}
    with Running(write_checkpoint(tmp_path), capture=["hidden"], **small) as engine:
        engine.engine.runner.shapes = (max(engine.engine.runner.shapes),)  # the others would have to be compiled
        results = engine.run(requests)
        assert engine.metric("vllm:num_preemptions_total") > 0
        assert engine.metric("vllm:prefix_cache_hits_total") == 0
        assert engine.engine.runner.sizes.decode_steps == 1
        engine.wait_idle()
    for (name, _), result in results.items():
        tokens = [*requests[name].prompt_token_ids, *result.tokens]
        values = captured.values(TapInfo("hidden", (1,), "float32"), b"".join(result.captured[0]))
        assert np.rint(values[:, 0]).tolist() == (tokens[:-1] if result.tokens else tokens)


def test_their_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "ToyForCausalLM", "toy_model")
    toy, options = write_checkpoint(tmp_path), {"pages": 64, "length": 64, "warmup": "lazy", "capture": ["*"]}
    monkeypatch.setattr(sizing, "MOST_CAPTURED", 20 * 4)
    with Running(toy, budget=None, **options) as engine:
        assert engine.engine.info.max_num_batched_tokens == 16, "worked out"
        assert max(engine.engine.runner.shapes).tokens == 16
        assert engine.engine.info.device_bytes["workspace"] >= 2 * 16 * 4, "of two launches"
    monkeypatch.setattr(sizing, "MOST_CAPTURED", 2**18)
    with pytest.raises(
        ConfigError, match=r"14 values are 14.0 KiB a token, in a step of 512 tokens 7 MiB.*lower --max-num"
    ):
        Running(resolve_model(None), budget=512, **options).__enter__()


# --- a file of one's own in the engine -------------------------------------------------------------------------------


def test_a_file_that_imports_no_engine_has_marks_of_its_own(tmp_path):
    path = ROOT / "tests" / "goldens" / "examples" / "gpt_neox"
    text = (ROOT / "examples" / "gpt_neox.py").read_text()
    text = text.replace("from jaxserve.taps import tap\n", "from jax.ad_checkpoint import checkpoint_name as tap\n")
    text = text.replace("x + attention + mlp", 'x + attention + tap(mlp, f"mine.{layer}")')
    (tmp_path / "mine.py").write_text(text)
    small = {"pages": 32, "seqs": 2, "budget": 8, "warmup": "lazy", "code": str(tmp_path / "mine.py")}
    with Running(path, capture=["mine.1", "layers.1.mlp"], **small) as engine:
        engine.engine.runner.shapes = (max(engine.engine.runner.shapes),)
        values = arrays(engine, engine.one([3, 4, 5], max_tokens=2, ignore_eos=True))
        assert list(values) == ["layers.1.mlp", "mine.1"] and values["mine.1"].shape == (4, 48)
        np.testing.assert_array_equal(values["mine.1"], values["layers.1.mlp"])
    with pytest.raises(
        ConfigError, match=r"layers.\*.block \(2 of them\), mine.\* \(2 of them\), hidden|mine.\* .*block"
    ):
        Running(path, capture=["layers.*.gate"], **small).__enter__()


def test_what_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr("jaxserve.loading.load_params", lambda *args, **rest: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"'layers.9.\*': llama has no such value; it has embed, layers"):
        LLM(capture=["hidden", "layers.9.*"])
    with pytest.raises(ConfigError, match="capture is served of models that generate"):
        LLM(str(ROOT / "tests" / "goldens" / "embeddings" / "bert"), capture="hidden")
    with pytest.raises(ConfigError, match=r"capture must be names of values.*got \('hidden', 3\)"):
        LLM(capture=["hidden", 3])
    with pytest.raises(ConfigError, match="capture is served on one host only"):
        EngineOptions(capture=("hidden",), place=HostPlace(index=0, count=2, coordinator="a", port=1, secret="s"))
