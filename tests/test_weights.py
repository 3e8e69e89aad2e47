"""Checkpoints as a user meets them: every kind read back equal, and everything wrong with one told in one message."""

import json
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.spec import Model, ParamSpec, stacked
from jaxserve.weights import open_checkpoint
from jaxserve.weights.convert import convert
from jaxserve.weights.load import load_params, splits

ROOT = Path(__file__).parent.parent
BF16 = np.dtype(ml_dtypes.bfloat16)
EMBED, NORM, QUERY, HEAD = "embed_tokens.weight", "norm.weight", "layers.0.q_proj.weight", "lm_head.weight"
SPECS = {
    "embed": ParamSpec(("vocab", "width"), (6, 8), EMBED),
    "blocks": [{"query": ParamSpec(("heads", "head_dim", "width"), (2, 4, 8), QUERY)}],
    "end": (ParamSpec(("width",), (8,), NORM), ParamSpec(("vocab", "width"), (6, 8), HEAD)),
}


def fake_model(specs=SPECS):
    return Model.of(
        SimpleNamespace(
            __name__="fake",
            Config=SimpleNamespace(from_hf=lambda hf: None),
            param_specs=lambda config: specs,
            forward=None,
            logits=None,
        )
    )


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {EMBED: (6, 8), QUERY: (8, 8), NORM: (8,), HEAD: (6, 8)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(path, weights, *, shards=None, config=None):
    """A checkpoint directory; `shards` gives each tensor's file."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["Fake"]} | (config or {})))
    if shards is None:
        save_file(weights, path / "model.safetensors")
        return path
    for shard in set(shards.values()):
        save_file({n: weights[n] for n in weights if shards[n] == shard}, path / shard)
    index(path, shards)
    return path


def index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(path, *, specs=SPECS, dtype=np.float32, progress=None):
    return load_params(
        fake_model(specs),
        None,
        open_checkpoint(path),
        dtype=dtype,
        device_put=lambda array, spec: jnp.asarray(array),
        progress=progress,
    )


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


SHARDS = {EMBED: "a.safetensors", QUERY: "b.safetensors", NORM: "b.safetensors", HEAD: "a.safetensors"}


@pytest.mark.parametrize("stored", [np.float32, BF16, np.float16], ids=str)
@pytest.mark.parametrize("wanted", [np.float32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["single", "sharded", "orbax"])
def test_what_was_saved_is_loaded(tmp_path, stored, wanted, kind):
    weights = tensors(stored)
    path = write(tmp_path / "src", weights, shards=SHARDS if kind == "sharded" else None)
    if kind == "orbax":
        convert(path, tmp_path / "orbax")
        path = tmp_path / "orbax"
    seen = []
    params = load(path, dtype=wanted, progress=lambda done, total: seen.append((done, total)))

    want = {name: w.astype(wanted) for name, w in weights.items()}
    same(params["embed"], want[EMBED])
    same(params["blocks"][0]["query"], want[QUERY].reshape(2, 4, 8))
    same(params["end"][0], want[NORM])
    same(params["end"][1], want[HEAD])

    total = sum(w.nbytes for w in weights.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})


def test_two_leaves_may_share_a_tensor(tmp_path):
    specs = {"a": ParamSpec(("width",), (8,), NORM), "b": ParamSpec(("x", "y"), (2, 4), NORM)}
    weights = {NORM: tensors()[NORM]}
    params = load(write(tmp_path / "m", weights), specs=specs)
    same(params["a"], weights[NORM])
    same(params["b"], weights[NORM].reshape(2, 4))


STACKED = stacked(SimpleNamespace(heads=2, kv_heads=1, head_dim=2, width=8), QUERY,
                  q="heads head_dim width", k="kv_heads head_dim width", v="kv_heads head_dim width")  # fmt: skip


def test_specs_may_be_rows_of_a_tensor(tmp_path):
    whole = tensors()[QUERY]
    path = write(tmp_path / "m", {QUERY: whole})
    seen = []
    params = load(path, specs=STACKED, progress=lambda done, total: seen.append((done, total)))
    same(params["q"], whole[:4].reshape(2, 2, 8))
    same(params["k"], whole[4:6].reshape(1, 2, 8))
    same(params["v"], whole[6:].reshape(1, 2, 8))
    assert seen[-1] == (whole.nbytes, whole.nbytes)
    handed = []
    load_params(
        fake_model(STACKED),
        None,
        open_checkpoint(path),
        dtype=np.float32,
        device_put=lambda array, spec: jnp.asarray(array),
        pack=lambda w, spec: handed.append((w, spec.rows)) or w,
    )
    assert sorted(rows for _, rows in handed) == [(0, 4), (4, 6), (6, 8)]
    assert all(np.array_equal(w, whole[slice(*rows)]) for w, rows in handed)


@pytest.mark.parametrize("rows", [7, 9])
def test_rows_that_no_spec_wants_or_that_are_not_there(tmp_path, rows):
    path = write(tmp_path / "m", {QUERY: np.ones((rows, 8), np.float32)})
    with pytest.raises(CheckpointError, match=rf"{QUERY} is \[{rows}, 8\], the model needs \[8, 8\]"):
        load(path, specs=STACKED)


def test_the_loaded_array_is_not_the_file(tmp_path):
    path = write(tmp_path / "m", tensors())
    handed = []
    load_params(
        fake_model(),
        None,
        open_checkpoint(path),
        dtype=np.float32,
        device_put=lambda array, spec: handed.append(array) or jnp.asarray(array),
    )
    assert len(handed) == 4 and all(array.flags.writeable and array.flags.aligned for array in handed)


def test_staging_is_bounded_and_an_error_comes_through(tmp_path):
    names = [f"w{i}" for i in range(40)]
    path = write(tmp_path / "m", {n: np.ones(3, np.float32) for n in names})
    lock, here, most = threading.Lock(), 0, 0

    def device_put(array, spec):
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        threading.Event().wait(0.002)
        with lock:
            here -= 1
        if spec.name == "w25":
            raise MemoryError("device is full")
        return jnp.asarray(array)

    specs = [ParamSpec(("width",), (3,), n) for n in names]
    with pytest.raises(MemoryError, match="device is full"):
        load_params(fake_model(specs), None, open_checkpoint(path), dtype=np.float32, device_put=device_put, threads=3)
    assert most <= 3
    assert not [t for t in threading.enumerate() if t.name.startswith("load")]


def test_everything_wrong_is_told_at_once(tmp_path):
    weights = tensors()
    del weights[NORM]
    weights[QUERY] = weights[QUERY][:5].copy()
    weights[HEAD] = weights[HEAD].astype(np.float64)
    weights |= {f"layers.{i}.extra": np.ones(1, np.float32) for i in range(25)}
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path / "m", weights))
    text = caught.value.message
    assert text.startswith(f"checkpoint {tmp_path / 'm'}: 28 problems\n")
    assert f"missing tensor (1): {NORM}\n" in text
    assert f"misshapen tensor (1): {QUERY} is [5, 8], the model needs [2, 4, 8]" in text
    assert f"float32, bfloat16, float16 (1): {HEAD} is float64" in text
    assert "unexpected tensor (25): layers.0.extra; layers.1.extra; layers.10.extra" in text
    assert "; and 5 more" in text and text.count(".extra") == 20


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float64, ml_dtypes.float8_e4m3fn, np.bool_], ids=str)
def test_other_dtypes_are_refused(tmp_path, kind):
    weights = tensors() | {NORM: np.ones(8, kind)}
    with pytest.raises(CheckpointError, match=rf"{NORM} is {np.dtype(kind).name}"):
        load(write(tmp_path / "m", weights))


def test_what_may_be_passed_over(tmp_path):
    tied = {"embed": SPECS["embed"]}
    weights = tensors()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.int32), HEAD: weights[HEAD]}
    for config in ({}, {"tie_word_embeddings": True}):
        path = write(tmp_path / "m", {EMBED: weights[EMBED]} | extra, config=config)
        same(load(path, specs=tied)["embed"], weights[EMBED])
    write(path, {EMBED: weights[EMBED]} | extra, config={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=rf"1 problem\n  unexpected tensor \(1\): {HEAD}$"):
        load(path, specs=tied)


def test_a_transposed_matrix_is_misshapen():
    assert splits((48, 64), (48, 64)) and splits((48, 64), (4, 12, 64)) and splits((48, 64), (4, 12, 8, 8))
    assert splits((48, 1), (48,)) and splits((), (1,)) and splits((0, 3), (0, 3)) and splits((8,), (2, 1, 4))
    assert not splits((48, 64), (64, 48)) and not splits((48, 64), (8, 8, 48)) and not splits((48, 64), (48 * 64,))
    assert not splits((48, 64), (48,)) and not splits((48,), (48, 64)) and not splits((6,), (4, 2))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), max_size=4))
def test_every_split_of_every_axis_fits(groups):
    stored = tuple(int(np.prod(group)) for group in groups)
    assert splits(stored, tuple(n for group in groups for n in group))


# What a damaged file says


def damaged(header, data=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": (b"", "truncated or not a safetensors file"),
    "text": (b"<html>Not found</html>", "truncated or not a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "huge header": (damaged(b"{}", length=2**63), "truncated or not a safetensors file"),
    "bad json": (damaged(b'{"a": '), "not valid JSON"),
    "deep json": (damaged(b"[" * 100_000), "not valid JSON"),
    "not utf-8": (damaged(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (damaged([]), "not a JSON object"),
    "a name twice": (damaged(b'{"a": 1, "a": 2}'), "a name occurs twice"),
    "no offsets": (damaged({"a": {"dtype": "F32", "shape": [1]}}), "'a' lacks"),
    "no entry": (damaged({"a": 3}), "'a' lacks"),
    "unknown dtype": (damaged({"a": entry(0, 4, [1], "F33")}, b"1234"), "unknown dtype 'F33'"),
    "negative": (damaged({"a": entry(-4, 0, [1])}), "offsets"),
    "true": (damaged({"a": entry(0, 4, [True])}, b"1234"), "has shape"),
    "float": (damaged({"a": entry(0, 4, [1.0])}, b"1234"), "has shape"),
    "not its size": (damaged({"a": entry(0, 8, [3])}, b"12345678"), "of 12 bytes has offsets [0, 8]"),
    "astronomic": (damaged({"a": entry(0, 0, [0, 2**62])}), "impossible shape"),
    "truncated": (damaged({"a": entry(0, 8)}, b"1234567"), "truncated: tensor 'a'"),
    "overlap": (damaged({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' overlaps 'a'"),
    "the same bytes": (damaged({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
    "a gap": (damaged({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "leaves 4 bytes unused after 'a'"),
    "a tail": (damaged({"a": entry(0, 4)}, bytes(6)), "2 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, case):
    data, said = DAMAGED[case]
    path = write(tmp_path / "m", tensors())
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        open_checkpoint(path)
    assert str(path / "model.safetensors") in caught.value.message and len(caught.value.message) < 1000


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = write(tmp_path / "m", tensors())
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # sparse
    with pytest.raises(CheckpointError, match="header of 1073741824 bytes; the format allows 100000000"):
        open_checkpoint(path)


VALID = save({name: w[:2].copy() for name, w in tensors(BF16).items()})


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, len(VALID)), st.integers(0, len(VALID)))
def test_no_bytes_do_worse_than_a_checkpoint_error(tmp_path_factory, junk, start, end):
    path = tmp_path_factory.getbasetemp() / "junk"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(VALID[:start] + junk + VALID[end:])
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return
    for name in checkpoint.names():
        assert checkpoint.read(name).shape == checkpoint.shape(name)


def test_everything_wrong_with_an_index_is_told_at_once(tmp_path):
    weights = tensors()
    path = write(tmp_path / "m", weights, shards=SHARDS)
    save_file({n: weights[n] for n in (QUERY, NORM, EMBED)}, path / "b.safetensors")  # EMBED is in a, too
    (path / "c.safetensors").write_bytes(b"broken")
    moved = {HEAD: "b.safetensors", "gone": "a.safetensors"}
    index(path, SHARDS | moved | {"x": "c.safetensors", "y": "d.safetensors", "z": "../m/a.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = caught.value.message
    assert "6 problems" in text
    assert "missing shard (1): d.safetensors" in text
    assert "shard outside the directory (1): '../m/a.safetensors'" in text
    assert f"unreadable shard (1): {path / 'c.safetensors'}: truncated or not" in text
    assert f"tensor in two shards (1): {EMBED} in a.safetensors and b.safetensors" in text
    assert "gone not in a.safetensors, it is in no shard" in text
    assert f"{HEAD} not in b.safetensors, it is in a.safetensors" in text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": 3}']
)
def test_a_bad_index_is_named(tmp_path, text):
    path = write(tmp_path / "m", tensors(), shards=SHARDS)
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json: not a safetensors index"):
        open_checkpoint(path)


def test_a_directory_that_holds_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors, .*it holds pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_one_tensor_of_a_file_larger_than_memory(tmp_path):
    """The file claims a 4 TB tensor (sparse on disk); reading its neighbour must not touch it."""
    small, big = np.arange(8, dtype=np.float32), 1 << 42
    header = {"small": entry(big, big + 32), "big": entry(0, big)}
    path = write(tmp_path / "m", {"x": small})
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        try:
            file.seek(8 + len(raw) + big)
            file.write(small.tobytes())
        except OSError:
            pytest.skip("the file system holds no file of 4 TB")
    checkpoint = open_checkpoint(path)
    assert checkpoint.shape("big") == (1 << 40,)
    same(checkpoint.read("small"), small)
    view = checkpoint.read("big")
    assert view.nbytes == big and not view.flags.owndata and not view.flags.writeable
    assert view[12345] == 0


# Orbax


def test_convert_carries_everything_and_the_copy_is_a_checkpoint(tmp_path):
    weights = tensors(BF16)
    src, dst = write(tmp_path / "src", weights, shards=SHARDS, config={"torch_dtype": "bfloat16"}), tmp_path / "a" / "b"
    beside = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json", "merges.txt"]
    for name in [*beside, "chat_template.jinja", "pytorch_model.bin"]:
        (src / name).write_text(name)
    seen = []
    convert(src, dst, progress=lambda done, total: seen.append((done, total)))

    assert {p.name for p in dst.iterdir()} == {*beside, "chat_template.jinja", "config.json", "params"}
    assert all((dst / name).read_text() == name for name in beside)
    assert not list(tmp_path.rglob("*.tmp*"))
    total = sum(w.nbytes for w in weights.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)

    checkpoint = open_checkpoint(dst)
    assert checkpoint.config == open_checkpoint(src).config
    assert checkpoint.names() == frozenset(weights)
    for name, weight in weights.items():
        assert checkpoint.shape(name) == weight.shape and checkpoint.dtype(name) == BF16
        same(checkpoint.read(name), weight)


def test_convert_casts(tmp_path):
    weights = tensors(np.float32)
    convert(write(tmp_path / "src", weights), tmp_path / "dst", dtype=ml_dtypes.bfloat16)
    checkpoint = open_checkpoint(tmp_path / "dst")
    assert checkpoint.config["dtype"] == "bfloat16"
    for name, weight in weights.items():
        same(checkpoint.read(name), weight.astype(BF16))


def test_convert_refuses(tmp_path):
    src = write(tmp_path / "src", tensors())
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").touch()
    for dst in (taken, taken / "precious", src):
        with pytest.raises(ConfigError, match="exists and is not an empty directory"):
            convert(src, dst)
    assert [p.name for p in taken.iterdir()] == ["precious"]

    (tmp_path / "dst.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"dst\.tmp exists"):
        convert(src, tmp_path / "dst")
    assert (tmp_path / "dst.tmp").exists() and not (tmp_path / "dst").exists()

    save_file(tensors() | {"steps": np.arange(3)}, src / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unsupported dtype \(1\): steps is int64"):
        convert(src, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("when", ["before the weights", "before the rename"])
def test_an_interrupted_convert_leaves_nothing(tmp_path, when):
    src, dst = write(tmp_path / "src", tensors()), tmp_path / "dst"
    dst.mkdir()  # empty: allowed

    def interrupt(done, total):
        if threading.current_thread() is threading.main_thread() and (done == 0) == (when == "before the weights"):
            assert (tmp_path / "dst.tmp" / "params").exists() == (done == total)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(src, dst, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"] and not any(dst.iterdir())
    convert(src, dst)
    assert open_checkpoint(dst).names() == frozenset(tensors())


READ_DAMAGED = """
import os, pathlib, sys
from jaxserve.errors import CheckpointError
from jaxserve.weights import open_checkpoint
path, name = pathlib.Path(sys.argv[1]), sys.argv[2]
checkpoint = open_checkpoint(path)
for data in path.rglob("d/*"):
    os.truncate(data, 3)
for attempt in (lambda: checkpoint.read(name), lambda: open_checkpoint(path)):
    try:
        attempt()
    except CheckpointError as error:
        print(error.message.replace(chr(10), " "))
"""


def test_a_damaged_orbax_checkpoint_is_named(tmp_path):
    src, dst = write(tmp_path / "src", {EMBED: np.ones((256, 256), np.float32)}), tmp_path / "dst"
    convert(src, dst)
    # In a process of its own: tensorstore may report a failed read once more, to an event loop that Orbax has closed.
    done = subprocess.run(
        [sys.executable, "-c", READ_DAMAGED, str(dst), EMBED], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stdout + done.stderr
    assert said[0].startswith(f"{dst / 'params'}: Orbax cannot read {EMBED}: ") and "jaxserve convert" in said[0]
    assert said[1].startswith(f"{dst / 'params'}: Orbax cannot read its metadata") and "jaxserve convert" in said[1]

    (dst / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read its metadata"):
        open_checkpoint(dst)
    (dst / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="not a complete Orbax PyTree"):
        open_checkpoint(dst)


def test_an_orbax_tree_written_by_a_training_run(tmp_path):
    """jax.Array leaves, Orbax's own defaults; and a nested tree, which is refused by name."""
    import orbax.checkpoint as ocp

    weights = tensors(BF16)
    (tmp_path / "config.json").write_text("{}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", jax.tree.map(jnp.asarray, weights))
    params = load(tmp_path, dtype=BF16)
    same(params["embed"], weights[EMBED])

    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "config.json").write_text("{}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(nested / "params", {"model": {"norm": jnp.ones(2)}})
    with pytest.raises(CheckpointError, match=r"flat dict of arrays \(1\): model"):
        open_checkpoint(nested)


def test_a_reference_model_is_read_as_safetensors_reads_it(shared_data: Path):
    from safetensors.numpy import load_file

    path = shared_data / "models" / "stories260K"
    checkpoint = open_checkpoint(path)
    want = load_file(path / "model.safetensors")
    assert checkpoint.names() == frozenset(want)
    for name, weight in want.items():
        same(checkpoint.read(name), weight)
