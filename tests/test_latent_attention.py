"""Latent attention (MLA): bodies that read latents against the dense oracle, and how a cache of them is declared."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running_engine
from test_kernels import PAGE, body_of, oracle, random_batch

from jaxserve import attention
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.dry_run import trace
from jaxserve.errors import ConfigError
from jaxserve.layers import by_head
from jaxserve.loading import load_model
from jaxserve.models import find_model
from kernels_pallas.ragged_paged_attention import gpu, tpu
from kernels_pallas.ragged_paged_attention.contract import Int8Cache, latent_row
from kernels_pallas.ragged_paged_attention.tuning import Blocks, blocks_for
from kernels_pallas.ragged_paged_attention.tuning.gpu import GpuBlocks
from kernels_pallas.ragged_paged_attention.tuning.gpu import blocks_for as gpu_blocks_for

ROOT = Path(__file__).parent.parent


def latent_batch(rng, *, head_dim, **sizes):
    """As `random_batch`, of latents: a row is a key alone and zeros past it, or NaN where nobody has written."""
    args, kv = random_batch(rng, kv_heads=1, head_dim=head_dim, **sizes)
    keys = np.asarray(args[3])[..., :head_dim]
    past = np.zeros((*keys.shape[:2], latent_row(head_dim) - head_dim), np.float32) * keys[..., :1]
    args[2], args[3] = None, jnp.asarray(np.concatenate([keys, past], axis=-1))
    return args, [np.stack([rows[:, :, 0]] * 2, axis=2) for rows in kv]


SIZES = [(4, 24, 16), (3, 12, 12), (16, 144, 129)]
"""(heads, head_dim, value_dim)"""


@pytest.mark.parametrize(
    ("body", "page", "sizes", "window"),
    [
        *(("reference", page, sizes, None) for page, sizes in zip((PAGE, 16, 48), SIZES, strict=True)),
        ("reference", PAGE, SIZES[0], 7),
        *(("cpu", page, sizes, None) for page, sizes in zip((PAGE, 16, 48), SIZES, strict=True)),
        ("cpu", 16, SIZES[0], 7),
        ("tpu", PAGE, SIZES[0], 7),
        ("gpu", PAGE, SIZES[0], 7),
        ("gpu", 16, SIZES[1], None),
        ("gpu", 48, SIZES[2], None),
    ],  # fmt: skip
    ids=str,
)
def test_parity(body, page, sizes, window):
    kernel, (heads, head_dim, value_dim) = body_of(body), sizes
    rng = np.random.default_rng(heads)
    run = jax.jit(lambda *a: kernel(*a, scale=0.3, window=window, value_dim=value_dim))
    most = dict(tokens=32, seqs_total=6) if body in ("tpu", "gpu") else {}  # which are interpreted
    for case in (
        dict(q_lens=[1, 1, 1], pasts=[0, 5, 300]),
        dict(q_lens=[1, 1, 3, 17, 1], pasts=[9, 39, 4, 0, 130]),
    ):
        args, kv = latent_batch(rng, heads=heads, head_dim=head_dim, page=page, **case, **most)
        out, cache = (np.asarray(a) for a in run(*args))
        want = oracle(args, kv, 0.3, window)[..., :value_dim]
        assert out.shape == (*args[0].shape[:2], value_dim) and np.isfinite(out).all()
        np.testing.assert_allclose(out[: len(want)], want, rtol=2e-5, atol=2e-5)
        table = np.asarray(args[5])
        for s, rows in enumerate(kv):
            got = cache[table[s]].reshape(-1, cache.shape[2])[: len(rows)]
            np.testing.assert_array_equal(got[:, :head_dim], rows[:, 0, 0])
            assert not got[:, head_dim:].any()
        assert np.isfinite(cache).all(axis=-1).sum() == sum(map(len, kv)), "wrote outside its pages"


@pytest.mark.parametrize(
    ("body", "queries", "kept"),
    [("cpu", "float32", "float16"), ("reference", "bfloat16", "float16"), ("reference", "bfloat16", "float8_e4m3fn"),
     ("tpu", "bfloat16", "bfloat16"), ("gpu", "bfloat16", "bfloat16"), ("gpu", "float16", "float8_e4m3fn")],
)  # fmt: skip
def test_types(body, queries, kept):
    """The heads of DeepSeek-V2-Lite, against float64, from the latents as the cache keeps them."""
    kernel = body_of(body)
    if body == "tpu":
        kernel = partial(kernel.func, interpret=True, decode=Blocks(1, 4, 2), prefill=Blocks(16, 4, 2))
    if body == "gpu":
        kernel = partial(kernel.func, interpret=True)  # by rule
    args, kv = latent_batch(
        np.random.default_rng(2), heads=16, head_dim=576, page=8, pages=60, tokens=32, seqs_total=4,
        q_lens=[1, 1, 5, 17], pasts=[0, 90, 50, 9],
    )  # fmt: skip
    held = args[3].astype(queries).astype(kept)
    args = [a.astype(queries) if i < 2 else held if i == 3 else a for i, a in enumerate(args)]
    out, cache = jax.jit(lambda *a: kernel(*a, scale=0.02, value_dim=512))(*args)
    assert cache.dtype == kept and out.dtype == queries
    kv = [np.asarray(jnp.asarray(rows).astype(queries).astype(kept), np.float64) for rows in kv]
    want = oracle([np.asarray(args[0], np.float64), *args[1:]], kv, 0.02, None)[..., :512]
    close = 2e-3 if queries == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(want)], want, rtol=close, atol=close)


def test_a_prompt_is_the_same_however_it_is_cut(compiler):
    """On CPU, to the bit, whichever part of the heads an item of work takes."""
    rng, total, table = np.random.default_rng(5), 150, np.random.default_rng(6).permutation(20)[None]
    q, k = (jnp.asarray(rng.normal(size=(total, n, 72)), jnp.float32) for n in (16, 1))
    run = jax.jit(partial(body_of("cpu"), scale=0.2, value_dim=64))

    def cut(*sizes):
        cache, out, done = jnp.full((20, 16, latent_row(72)), jnp.nan), [], 0
        for size in sizes:
            piece, done = slice(done, done + size), done + size
            lens, cu = jnp.asarray([done], jnp.int32), jnp.asarray([0, size], jnp.int32)
            last = jnp.asarray(table, jnp.int32), cu, jnp.asarray([0, 0, 1], jnp.int32)
            some, cache = run(q[piece], k[piece], None, cache, lens, *last)
            out.append(np.asarray(some))
        return np.concatenate(out)

    whole = cut(total)
    for sizes in ([1] * 20 + [130], [7, 64, 1, 78]):
        np.testing.assert_array_equal(cut(*sizes), whole)


@pytest.mark.parametrize("shape", [(16, 24, 40, 64), (5, 24, 17, 33), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_by_head(compiler, shape, dtype):
    """In C++: right, and the same bits for a token whatever others there are."""
    (heads, keys, values, rank), rng = shape, np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(heads, keys + values, rank)), dtype)
    for transposed, rows, inputs in ((False, slice(keys), keys), (True, slice(keys, None), rank)):
        x = jnp.asarray(rng.normal(size=(100, heads, inputs)), dtype)
        want = np.einsum("tnr,nir->tni" if transposed else "tni,nir->tnr", *(np.float64(a) for a in (x, w[:, rows])))
        run = jax.jit(partial(by_head, rows=rows, transposed=transposed))
        assert "jaxserve_by_head" in run.lower(x, w).as_text()
        whole = run(x, w)
        assert whole.dtype == dtype
        limit = 1e-6 if dtype == "float32" else 4e-3
        assert np.abs(np.float64(whole) - want).max() <= limit * np.abs(want).max()
        for count in (1, 2, 47, 49):
            np.testing.assert_array_equal(run(x[3 : 3 + count], w), whole[3 : 3 + count])


def test_a_token_does_not_depend_on_its_neighbours(compiler):
    """Logprobs of a whole model on CPU are the same to the last bit alone and in a crowd whose prompts are cut."""
    rng = np.random.default_rng(0)
    prompts = {str(i): rng.integers(3, 90, int(n)).tolist() for i, n in enumerate(rng.integers(5, 60, 6))}
    requests = {
        i: running_engine.request(i, tokens, max_tokens=8, ignore_eos=True, logprobs=3) for i, tokens in prompts.items()
    }
    with running_engine.Running(ROOT / "tests/goldens/deepseek_v2", pages=96, budget=32, warmup="lazy") as engine:
        assert engine.engine.info.attention == "cpu"
        crowd = engine.run(requests)
        for i, request in requests.items():
            alone = engine.run({i: request})
            assert (alone[i, 0].tokens, alone[i, 0].logprobs) == (crowd[i, 0].tokens, crowd[i, 0].logprobs)


@pytest.mark.parametrize(
    "options", [{}, dict(soft_cap=0.7, sinks=np.linspace(-6, 9, 20)), dict(causal=False)], ids="+".join
)
def test_the_gpus_body_cuts_heads_and_positions(options):
    """More heads than a share has rows, also of one query token, and few sequences, whose parts are merged."""
    blocks = GpuBlocks(32, 2, 1, waves=8, rows=16)
    kernel = partial(gpu.ragged_paged_attention, interpret=True, decode=blocks, prefill=blocks._replace(heads=7))
    args, kv = latent_batch(
        np.random.default_rng(3), heads=20, head_dim=40, page=16, pages=60, tokens=20, seqs_total=3,
        q_lens=[1, 1, 9], pasts=[70, 300, 40],
    )  # fmt: skip
    out, _ = jax.jit(partial(kernel, chip=gpu.Chip("a GPU of one core", "8.0", 1), scale=0.2, value_dim=33, **options))(
        *args
    )
    want = oracle(args, kv, 0.2, None, **options)[..., :33]
    np.testing.assert_allclose(np.asarray(out)[: len(want)], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("capability", "shared"), [("8.0", 163), ("8.6", 99), ("8.9", 99), ("9.0", 227), ("12.0", 99)])
@pytest.mark.parametrize(
    ("queries", "kept"), [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float32", "float32")]
)
def test_blocks_by_rule_fit_a_gpus_shared_memory(capability, shared, queries, kept):
    """Queries, blocks of latents, and weights on their way to the product with values."""
    decode, prefill = gpu_blocks_for("a GPU", False, kept, queries, 32, 1, 576, 64, 512, capability)
    assert decode == prefill
    rows, size = decode.rows, jnp.dtype(queries).itemsize
    latents = decode.positions * (2 if kept == "bfloat16" else 1)  # others come by way of registers, or one by one
    assert (rows + latents) * 576 * size + rows * decode.positions * size <= shared << 10
    assert decode.positions * decode.least == 256


def test_the_reference_agrees_with_dense():
    options = dict(soft_cap=0.7, sinks=np.linspace(-6, 9, 4).astype(np.float32))
    args, _ = latent_batch(
        np.random.default_rng(12), heads=4, head_dim=24, q_lens=[100], pasts=[0], tokens=100, seqs_total=1
    )
    out, _ = body_of("reference")(*args, scale=0.9, value_dim=16, **options)
    want, _ = attention.dense(0, *args[:3], jnp.zeros(()), scale=0.9, value_dim=16, **options)
    assert want.shape == (100, 4, 16)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "q_lens"), [("float32", [1]), ("float16", [1, 1, 9])], ids=str)
def test_the_cache_is_updated_in_place(dtype, q_lens):
    """The donated cache is the result, and what the step needs besides does not grow with it."""

    def sizes(pages):
        args, _ = latent_batch(
            np.random.default_rng(0), heads=4, head_dim=24, q_lens=q_lens, pasts=[5] * len(q_lens), pages=pages,
            tokens=sum(q_lens), seqs_total=len(q_lens),
        )  # fmt: skip
        args[3] = args[3].astype(dtype)
        run = jax.jit(partial(body_of("reference"), scale=1.0, value_dim=16), donate_argnums=3)
        memory = run.lower(*args).compile().memory_analysis()
        assert memory.alias_size_in_bytes == args[3].nbytes
        return memory.temp_size_in_bytes

    assert sizes(3000) == sizes(300)


@pytest.mark.parametrize("body", ["cpu", "reference", "tpu", "gpu"])
def test_contract_names_what_is_wrong(body):
    kernel = partial(body_of(body), scale=1.0)
    args, _ = latent_batch(np.random.default_rng(0), heads=4, head_dim=8, q_lens=[2], pasts=[0])
    two, _ = random_batch(np.random.default_rng(0), heads=4, kv_heads=2, head_dim=8, q_lens=[2], pasts=[0])
    with pytest.raises(ValueError, match="value_dim is to be given where v is None, and only there; found None and no"):
        kernel(*args)
    with pytest.raises(ValueError, match=r"and only there; found 4 and v \(128, 2, 8\)"):
        kernel(*two, value_dim=4)
    with pytest.raises(ValueError, match="one kv head, and a value_dim of 1 to head_dim 8; found 2 and 4"):
        kernel(*two[:2], None, *two[3:], value_dim=4)
    for value_dim in (0, 9):
        with pytest.raises(ValueError, match=f"to head_dim 8; found 1 and {value_dim}"):
            kernel(*args, value_dim=value_dim)
    with pytest.raises(ValueError, match=r"cache must be \[pages, page_size, 128\]; found \(700, 4, 8\)"):
        kernel(*args[:3], args[3][..., :8], *args[4:], value_dim=4)
    bytes_ = Int8Cache(jnp.zeros((700, 4, 128), jnp.int8), jnp.zeros((700, 1, 4)))
    with pytest.raises(ValueError, match="latents are not kept in an Int8Cache"):
        kernel(*args[:3], bytes_, *args[4:], value_dim=4)


def test_the_kernel_is_chosen_for_latents(compiler):
    latents = dict(head_dim=576, value_dim=512)
    name, reason, _ = attention.choose("auto", "cpu", kv_dtype="float32", **latents)
    assert (name, reason) == ("cpu", "auto on cpu")
    assert attention.choose("auto", "tpu", **latents)[2] is tpu.ragged_paged_attention
    for kind in ("bfloat16", "float32", "float8_e4m3fn"):
        found = attention.choose("auto", "gpu", capability="9.0", kv_dtype=kind, **latents)
        assert found == ("gpu", "auto on gpu", gpu.ragged_paged_attention)
    wide = dict(head_dim=640, value_dim=512, capability="9.0")
    name, reason, _ = attention.choose("auto", "gpu", **wide)
    assert name == "reference" and "latents of up to 512 numbers that are values and 64 beside" in reason
    with pytest.raises(ConfigError, match="attention='gpu': .* 64 beside them; the model's have 512 and 128"):
        attention.choose("gpu", "gpu", **wide)
    for platform in ("cpu", "gpu", "tpu"):
        with pytest.raises(ConfigError, match=r"kv_cache_dtype int8 is not served with latent attention \(MLA\)"):
            attention.choose("auto", platform, kv_dtype="int8", **latents)
    with pytest.raises(ConfigError, match="not read by the CPU's kernels; give --attention reference"):
        attention.choose("auto", "cpu", kv_dtype="float8_e4m3fn", **latents)


@pytest.mark.parametrize("heads", [1, 4, 16, 32, 128])
def test_blocks_by_rule_fit_the_smallest_chip(heads):
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        for page in (32, 128):
            for blocks in blocks_for("a chip of tomorrow", dtype, heads, 1, 576, page, 512):
                fetched = blocks.buffers * blocks.pages * page * 640 * jnp.dtype(dtype).itemsize
                assert fetched <= 6 << 20 or blocks.pages == 1
    decode, _ = blocks_for("a chip of tomorrow", "bfloat16", 16, 1, 576, 64, 512)
    assert decode.pages == 8


def test_int8_is_refused_before_a_weight_is_read(compiler):
    def loaded(kind):
        device = DeviceOptions(kv_cache_dtype=kind, compile_cache_dir="")
        return load_model(ModelOptions(), device, ROOT / "tests/goldens/deepseek_v2_lite", said.append)

    said = []
    with pytest.raises(ConfigError, match="int8 is not served with latent attention"):
        loaded("int8")
    assert not any("weights" in message for message in said)
    assert loaded("auto").kv_dtype == np.float16, "as of other checkpoints of 16 bits"


# --- a model's cache ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite():
    """DeepSeek-V2-Lite's model and config."""
    return find_model(json.loads((ROOT / "configs/models/deepseek-v2-lite.json").read_text()))


def test_one_row_a_token_is_kept(lite):
    spec = lite[0].cache_spec(lite[1])
    assert (spec.kv_heads, spec.head_dim, spec.value_dim, spec.row) == (1, 576, 512, 640)
    assert attention.cache_shapes(spec, 10, 64, "bfloat16").shape == (270, 64, 640)


def test_the_weights_are_as_many_as_the_checkpoint_has(lite):
    specs = jax.tree.leaves(lite[0].param_specs(lite[1]), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    assert sum(int(np.prod(spec.shape)) for spec in specs) == 15_706_484_224


def misused(model, **changes):
    """The model with other arguments to `attend`."""

    def forward(p, c, tokens, positions, cache, attend):
        def other(layer, q, k, v, cache, **options):
            return attend(layer, q, k, changes.get("v", v) and k, cache, **options | changes.get("options", {}))

        return model.forward(p, c, tokens, positions, cache, other)

    return replace(model, forward=forward)


def test_a_model_file_that_misuses_latents_is_told(lite):
    model, config = lite[0], replace(lite[1], layers=1)
    trace(model, config, jnp.bfloat16)
    with pytest.raises(ConfigError, match="attend of layer 0 has value_dim=None; the config's is 512"):
        trace(misused(model, options={"value_dim": None}), config, jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"v is \[13, 1, 576\] of bfloat16; a latent's values are a part of k"):
        trace(misused(model, v=True), config, jnp.bfloat16)


@pytest.mark.parametrize(("kv_heads", "value_dim"), [(2, 4), (1, 0), (1, 9)])
def test_a_config_whose_latents_are_none_is_refused(lite, kv_heads, value_dim):
    config = SimpleNamespace(layers=1, kv_heads=kv_heads, head_dim=8, value_dim=value_dim)
    with pytest.raises(ConfigError, match=f"value_dim is {value_dim}, with {kv_heads} kv_heads of head_dim 8"):
        lite[0].cache_spec(config)


GROUPS = {"topk_method": "group_limited_greedy"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'; served are greedy and group_limited_greedy"),
        (GROUPS | {"n_group": 7}, "n_group=7 and topk_group=1, which do not give 6 of 64 experts"),
        (GROUPS | {"n_group": 16}, "n_group=16 and topk_group=1, which do not give 6 of 64 experts"),
        (GROUPS | {"n_group": 2, "topk_group": 3}, "n_group=2 and topk_group=3"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_experts_per_tok": 65}, "n_routed_experts=64 and num_experts_per_tok=65"),
        ({"n_shared_experts": None}, "incomplete for DeepseekV2ForCausalLM"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear' of deepseek_v2 is not served"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "incomplete .* KeyError.'original_max_position"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM is not served; served are DeepseekV2"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_what_is_not_served_is_refused_by_name(change, message):
    hf = json.loads((ROOT / "configs/models/deepseek-v2-lite.json").read_text())
    with pytest.raises(ConfigError, match=message):
        find_model(hf | change)
