"""GGUF: the container as it is, the model in Hugging Face's terms, everything wrong named, and `jaxserve show`."""

import json
import math
import random
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf_files
import ml_dtypes
import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, F32, F64, I8, I64, STRING, U8, U16, U32, U64, entry, file_bytes, tensor
from safetensors.numpy import save_file

from jaxserve import cli
from jaxserve.cli.show import about, lines
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import FORMATS, dequantise
from jaxserve.gguf import GgufFile, find_gguf
from jaxserve.layers import Rope
from jaxserve.models import find_model
from jaxserve.weights import open_checkpoint
from jaxserve.weights.gguf import ARCHITECTURES, GgufCheckpoint, halves_from_pairs
from jaxserve.weights.load import splits


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_DATA", raising=False)


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- the container --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_metadata(tmp_path, version) -> None:
    scalars = {
        "u8": (U8, 200), "i8": (I8, -5), "u16": (U16, 60_000), "u32": (U32, 2**32 - 1), "u64": (U64, 2**64 - 1),
        "i64": (I64, -(2**63)), "f32": (F32, 0.5), "f64": (F64, 0.1), "bool": (BOOL, True), "text": (STRING, "Grüße"),
        "empty": (STRING, ""),
    }  # fmt: skip
    arrays = {
        "numbers": (ARRAY, (F32, [0.5, -1.0])),
        "flags": (ARRAY, (BOOL, [True, False])),
        "none": (ARRAY, (U64, [])),
        "words": (ARRAY, (STRING, ["a", "", "ü"])),
        "nested": (ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"]), (ARRAY, [(I8, [-1])])])),
    }
    entries = [entry(key, *content) for key, content in (scalars | arrays).items()]
    file = GgufFile(saved(tmp_path / "m.gguf", file_bytes(entries, version=version)))
    assert file.version == version and not file.tensors
    assert {key: file.metadata[key] for key in scalars} == {key: content for key, (_, content) in scalars.items()}
    assert {key: type(file.metadata[key]) for key in ("u8", "f32", "bool")} == {"u8": int, "f32": float, "bool": bool}
    assert file.metadata["numbers"].dtype == np.float32 and file.metadata["numbers"].tolist() == [0.5, -1.0]
    assert file.metadata["flags"].dtype == bool and file.metadata["flags"].tolist() == [True, False]
    assert file.metadata["none"].dtype == np.uint64 and len(file.metadata["none"]) == 0
    assert file.metadata["words"] == ["a", "", "ü"]
    first, second, third = file.metadata["nested"]
    assert first.tolist() == [1, 2] and second == ["x"] and third[0].tolist() == [-1]


def test_tokens_keep_bytes_that_are_not_utf8(tmp_path) -> None:
    entries = [entry("tokens", ARRAY, (STRING, [b"\xe4\xb8", "ok"])), entry("one", STRING, b"\xff")]
    file = GgufFile(saved(tmp_path / "m.gguf", file_bytes(entries)))
    assert [t.encode("utf-8", "surrogateescape") for t in file.metadata["tokens"]] == [b"\xe4\xb8", b"ok"]
    assert file.metadata["one"].encode("utf-8", "surrogateescape") == b"\xff"


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_tensors_by_an_independent_writer(tmp_path, alignment) -> None:
    import gguf

    rng = np.random.default_rng(1)
    wanted = {"a": rng.normal(size=(3, 64)), "b": rng.normal(size=5), "c": rng.normal(size=(2, 3, 4, 32))}
    wanted = {name: array.astype(np.float32) for name, array in wanted.items()}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "any")
    writer.add_custom_alignment(alignment)
    for name, array in wanted.items():
        writer.add_tensor(name, array)
    packed = gguf.quants.quantize(wanted["a"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert list(file.tensors) == ["a", "b", "c", "q"]
    for name, array in wanted.items():
        info, raw = file.tensors[name], file.raw(name)
        assert (info.format, info.shape, info.nbytes) == (FORMATS["F32"], array.shape, array.nbytes)
        assert info.offset % alignment == 0 and info.file == tmp_path / "m.gguf"
        assert raw.shape == (math.prod(array.shape[:-1]), array.shape[-1] * 4) and not raw.flags.writeable
        assert raw.tobytes() == array.tobytes()
    assert file.tensors["q"].format is FORMATS["Q8_0"] and file.tensors["q"].shape == (3, 64)
    np.testing.assert_array_equal(file.raw("q"), packed)


def test_a_large_vocabulary_is_read_at_once(tmp_path) -> None:
    words = [f"token {i}" for i in range(151_936)]
    merges = [f"left{i} right" for i in range(151_387)]
    entries = [entry("tokens", ARRAY, (STRING, words)), entry("merges", ARRAY, (STRING, merges))]
    path = saved(tmp_path / "m.gguf", file_bytes([*entries, entry("types", ARRAY, (U32, range(151_936)))]))
    begun = time.process_time()
    metadata = GgufFile(path).metadata
    assert time.process_time() - begun < 1
    assert metadata["tokens"] == words and metadata["merges"] == merges and metadata["types"][-1] == 151_935


def good(code: int = 0, dims=(4,), offset: int = 0, name="x") -> bytes:
    return tensor(name, dims, code, offset)


def deep(levels: int) -> bytes:
    return b"".join(np.array([ARRAY], "<u4").tobytes() + np.array([1], "<u8").tobytes() for _ in range(levels))


DAMAGED = {
    "empty": (b"", "the file is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "html": (b"<html>Not found</html>", r"not a GGUF file: it begins with b'<htm'"),
    "old": (b"tjgg" + bytes(40), "not a GGUF file"),
    "header": (b"GGUF\3\0\0\0", "truncated: 8 bytes, a GGUF header needs 24"),
    "big endian": (b"GGUF\0\0\0\3" + bytes(16), "big-endian"),
    "version 1": (file_bytes(version=1), "GGUF version 1; read are versions 2 and 3; convert"),
    "version 4": (file_bytes(version=4), r"GGUF version 4; read are versions 2 and 3$"),
    "entries": (file_bytes(counts=(0, 2**40)), r"the metadata, 1099511627776 entries, at byte 24 needs"),
    "tensors": (file_bytes(counts=(2**63, 0)), "the list of tensors, 9223372036854775808 entries, at byte 24 needs"),
    "key length": (file_bytes([np.array([2**64 - 1, 0], "<u8").tobytes()]), "key 0 of the metadata at byte 32 needs"),
    "key": (file_bytes([entry(b"\xff\xfe", U8, 1)]), r"key 0 of the metadata at byte 24 is not UTF-8: b'\\xff\\xfe'"),
    "twice": (file_bytes([entry("a.b", U8, 1)] * 2), "key 'a.b' at byte 40 occurs twice"),
    "kind": (file_bytes([entry("a.b", 13, b"")]), "'a.b' at byte 39 has unknown type 13"),
    "array kind": (file_bytes([entry("a.b", ARRAY, bytes([99]) + bytes(11))]), "'a.b' at byte 39 is an array of unk"),
    "array count": (
        file_bytes([entry("a.b", ARRAY, b"\5\0\0\0" + b"\xff" * 8)]),
        "'a.b', an array of 18446744073709551615, at byte 51 needs 73786976294838206460 bytes",
    ),
    "array strings": (
        file_bytes([entry("a.b", ARRAY, b"\x08\0\0\0" + b"\2" + bytes(7) + b"\0" * 8 + b"\xff" * 8)]),
        "'a.b', element 1 of 2, at byte 59 needs",
    ),
    "deep": (file_bytes([entry("a.b", ARRAY, deep(200))]), "'a.b' at byte 87: arrays in arrays more than 4 deep"),
    "alignment 0": (file_bytes([entry("general.alignment", U32, 0)]), "general.alignment is 0, not a power of two"),
    "alignment 24": (file_bytes([entry("general.alignment", U32, 24)]), "general.alignment is 24, not a power"),
    "alignment big": (file_bytes([entry("general.alignment", U32, 2**31)]), "general.alignment is 2147483648"),
    "alignment text": (file_bytes([entry("general.alignment", STRING, "32")]), "general.alignment is '32'"),
    "name": (file_bytes([], [good(name=b"\xff")], bytes(16)), "name 0 of the tensors at byte 24 is not UTF-8"),
    "same name": (file_bytes([], [good(), good(offset=32)], bytes(64)), "tensor 'x' at byte 57 occurs twice"),
    "rank 0": (file_bytes([], [good(dims=()), bytes(32)]), "tensor 'x' at byte 33 has 0 dimensions"),
    "rank 5": (file_bytes([], [good(dims=[1] * 5)]), "tensor 'x' at byte 33 has 5 dimensions"),
    "no size": (file_bytes([], [good(dims=(4, 0))]), r"tensor 'x' at byte 37 has impossible dimensions \[4, 0\]"),
    "overflow": (file_bytes([], [good(dims=[2**32] * 3)]), "has impossible dimensions"),
    "row": (file_bytes([], [good(8, (33, 2))], bytes(128)), r"'x' of shape \[2, 33\]: .*Q8_0's block of 32"),
    "unaligned": (file_bytes([], [good(offset=8)], bytes(64)), "'x' has offset 8, which general.alignment 32 does not"),
    "cut": (file_bytes([], [good(dims=(4, 9))], bytes(100)), r"truncated: 196 bytes, 240 are needed; .*missing: x$"),
    "far": (file_bytes([], [good(offset=2**64 - 32)], bytes(64)), "128 bytes, 18446744073709551664 are needed"),
    "overlap": (
        file_bytes([], [good(dims=(16,)), good(name="y", offset=32)], bytes(64)),
        "tensor 'y' at byte 128 overlaps 'x', which ends at byte 160",
    ),
    "same place": (file_bytes([], [good(), good(name="y")], bytes(64)), "tensor 'y' at byte 96 overlaps 'x'"),
    "other type": (
        file_bytes([], [good(16, (256,)), good(16, (256,), name="y"), good(99, name="z")]),
        "tensor 'x' and 1 more of type IQ2_XXS; tensor 'z' of type number 99, which is not known; take .*Q8_0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("data, message", DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_with_a_file_is_said(tmp_path, data, message) -> None:
    path = saved(tmp_path / "m.gguf", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_a_file_cut_anywhere_is_refused(tmp_path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for size in range(0, len(whole) - 32, 397):  # the last tensor may be followed by padding
        with pytest.raises(CheckpointError, match="empty|truncated"):
            GgufFile(saved(tmp_path / "cut.gguf", whole[:size]))


# --- split files ----------------------------------------------------------------------------------------------------


def test_a_split_file_is_one(tmp_path) -> None:
    whole = GgufFile(gguf_files.write_model(tmp_path / "whole.gguf"))
    (tmp_path / "parts").mkdir()
    path = gguf_files.write_model(tmp_path / "parts" / "m.gguf", split=8)
    parts = GgufFile(path)
    assert len(parts.files) == 3 and parts.tensors.keys() == whole.tensors.keys()
    assert {info.file for info in parts.tensors.values()} == set(parts.files)
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.raw(name), whole.raw(name))
    assert open_checkpoint(tmp_path / "parts").config == GgufCheckpoint(tmp_path / "whole.gguf").config
    assert find_gguf(tmp_path / "parts") == path


def test_what_is_wrong_with_a_split_is_said(tmp_path) -> None:
    first = gguf_files.write_model(tmp_path / "m.gguf", split=8)
    _, second, third = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=rf"shard 2 of 3; name the first, {first.name}"):
        GgufFile(second)
    renamed = saved(tmp_path / "other.gguf", first.read_bytes())
    with pytest.raises(CheckpointError, match=r"shard 1 of 3 .*must end in -00001-of-00003\.gguf"):
        GgufFile(renamed)
    renamed.unlink()
    held = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{third.name}: split\.no 1 of 3 where 2 of 3 belongs"):
        GgufFile(first)
    split = [entry("split.no", U16, 2), entry("split.count", U16, 3)]
    third.write_bytes(file_bytes(split, [good(name="token_embd.weight")], bytes(16)))
    with pytest.raises(CheckpointError, match=rf"{third.name}: tensor 'token_embd.weight' is in {first.name} too"):
        GgufFile(first)
    third.write_bytes(file_bytes(split, [good()], bytes(16)))
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count is 21, the shards hold 17"):
        GgufFile(first)
    third.write_bytes(held[:-100])
    with pytest.raises(CheckpointError, match=rf"{third.name}: truncated"):
        GgufFile(first)
    second.unlink()
    third.unlink()
    for path in (first, tmp_path):
        with pytest.raises(CheckpointError, match=f"of its 3 shards are missing: {second.name}, {third.name}"):
            open_checkpoint(path)
    saved(first, file_bytes([entry("split.count", STRING, "3")]))
    with pytest.raises(CheckpointError, match=r"split\.count is '3', not a count"):
        GgufFile(first)


# --- which file -----------------------------------------------------------------------------------------------------


def test_which_file_a_path_means(tmp_path) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "nowhere") is None
    path = gguf_files.write_model(tmp_path / "a.gguf")
    assert find_gguf(tmp_path) == find_gguf(path) == path
    assert open_checkpoint(tmp_path).path == path
    blob = path.rename(tmp_path / "sha256-123")
    assert find_gguf(blob) == blob and find_gguf(tmp_path) is None
    assert open_checkpoint(blob).path == blob
    text = saved(tmp_path / "notes.txt", b"no")
    assert find_gguf(text) is None
    with pytest.raises(ConfigError, match=r"notes\.txt is not a GGUF file; give the directory"):
        open_checkpoint(text)
    blob.rename(path)
    gguf_files.write_model(tmp_path / "b.GGUF")
    with pytest.raises(ConfigError, match=r"holds 2 GGUF models; name one of them: a\.gguf, b\.GGUF"):
        open_checkpoint(tmp_path)
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None
    assert open_checkpoint(tmp_path).names() == {"x"}


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "qwen3moe"])  # which is below
def test_a_model_file_finds_its_tensors_and_nothing_else(tmp_path, architecture, tied, kind) -> None:
    tensors = gguf_files.model_tensors(architecture, tied=tied)
    keys = {"logit_scale": 1.0} if architecture == "granite" else {}
    path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, metadata=keys, kind=kind)
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    assert model.name == architecture
    assert config.tied is tied and config.head_dim == 16 and config.eps == 1e-5 and config.max_positions == 64
    import jax

    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    assert {spec.name for spec in specs} == checkpoint.names()
    for spec in specs:
        shape = checkpoint.shape(spec.name)
        assert splits(shape if spec.rows is None else (spec.rows[1] - spec.rows[0], *shape[1:]), spec.shape)
        read = checkpoint.read(spec.name)
        assert read.shape == checkpoint.shape(spec.name) and read.dtype == checkpoint.dtype(spec.name) == np.float32
        assert (checkpoint.blocks(spec.name) is not None) == (kind == "Q8_0" and read.ndim == 2)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(("architecture", "name"), [("llama", "mixtral"), ("qwen3moe", "qwen3_moe")])
def test_a_stack_of_experts_is_as_many_tensors(tmp_path, architecture, name, kind) -> None:
    import gguf
    import jax

    tensors = gguf_files.model_tensors(architecture, experts=True)
    path = gguf_files.write_model(
        tmp_path / "m.gguf", architecture, tensors=tensors, metadata=gguf_files.EXPERTS, kind=kind
    )
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    assert model.name == name and (config.experts, config.experts_used) == (3, 2)
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    names = [n for spec in specs for n in spec.names]
    assert set(names) == checkpoint.names()
    # Of qwen3moe's experts the file does not say the width: it is that of the layer, shared out.
    wrong = {n for s in specs for n in s.names if not splits(checkpoint.shape(n), s.tensor_shape)}
    assert all(".experts." in n for n in wrong) and bool(wrong) == (architecture == "qwen3moe")
    down = {"mixtral": "block_sparse_moe.experts.2.w2", "qwen3_moe": "mlp.experts.2.down_proj"}[name]
    down, stack = f"model.layers.1.{down}.weight", tensors["blk.1.ffn_down_exps.weight"]
    packed = gguf.quants.quantize(stack, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(
        checkpoint.read(down), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])[2]
    )
    if kind != "F32":
        np.testing.assert_array_equal(checkpoint.blocks(down).rows, packed[2])
    checkpoint.release(down)
    assert sum(checkpoint.nbytes(n) for n in names) == sum(t.nbytes for t in checkpoint.file.tensors.values())
    if architecture == "qwen3moe":
        metadata = gguf_files.EXPERTS | {"expert_feed_forward_length": gguf_files.FFN}
        path = gguf_files.write_model(tmp_path / "n.gguf", architecture, tensors=tensors, metadata=metadata)
        assert find_model(open_checkpoint(path).config)[1].expert_ffn == gguf_files.FFN


def test_experts_that_are_no_stack_are_named(tmp_path) -> None:
    tensors = gguf_files.model_tensors(experts=True)
    tensors["blk.0.ffn_up_exps.weight"] = tensors["blk.0.ffn_up_exps.weight"][0]
    path = gguf_files.write_model(tmp_path / "m.gguf", tensors=tensors, metadata=gguf_files.EXPERTS)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up_exps\.weight is \[64, 32\], not a stack of matrices"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_only_llama_has_rows_to_put_back(tmp_path, kind) -> None:
    import gguf

    for architecture in ("llama", "qwen3"):
        tensors = gguf_files.model_tensors(architecture)
        bias = np.arange(32, dtype=np.float32)
        tensors |= {"blk.0.attn_q.bias": bias}
        path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, kind=kind)
        checkpoint = GgufCheckpoint(path)
        packed = gguf.quants.quantize(tensors["blk.1.attn_q.weight"], gguf.GGMLQuantizationType[kind])
        stored = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
        # Head by head the even rows, then the odd ones.
        head = [*range(0, 16, 2), *range(1, 16, 2)]
        order = [*head, *(16 + i for i in head)] if architecture == "llama" else list(range(32))
        name = "model.layers.1.self_attn.q_proj.weight"
        np.testing.assert_allclose(checkpoint.read(name), stored[order], rtol=1e-6)
        np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), bias[order])
        if kind != "F32":
            stored = checkpoint.blocks(name)
            found, blocks = stored.format, stored.rows
            assert found is FORMATS[kind]
            np.testing.assert_array_equal(blocks, packed[order])
    order = halves_from_pairs(3, 6)
    assert order[:6].tolist() == [0, 2, 4, 1, 3, 5]
    assert np.argsort(order)[order].tolist() == list(range(18))


def test_dense_types_are_read_as_they_are(tmp_path) -> None:
    for kind, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        checkpoint = open_checkpoint(gguf_files.write_model(tmp_path / "m.gguf", kind=kind))
        read = checkpoint.read("model.layers.0.mlp.up_proj.weight")
        assert read.dtype == checkpoint.dtype("model.layers.0.mlp.up_proj.weight") == dtype
        assert not read.flags.writeable and checkpoint.blocks("model.layers.0.mlp.up_proj.weight") is None
        np.testing.assert_array_equal(read, gguf_files.model_tensors()["blk.0.ffn_up.weight"].astype(dtype))


def test_large_tensors_are_dequantised_in_pieces(tmp_path, monkeypatch) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", kind="Q8_0")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    whole = [open_checkpoint(path).read(name) for name in names]
    monkeypatch.setattr("jaxserve.weights.gguf._CHUNK", 5 * gguf_files.WIDTH)  # rows that do not fill the last piece
    for name, wanted in zip(names, whole, strict=True):
        np.testing.assert_array_equal(open_checkpoint(path).read(name), wanted)


def test_tensors_of_no_model_keep_their_names(tmp_path) -> None:
    extra = {name: np.ones(4, np.float32) for name in ("blk.0.attn_sinks", "blk.00.attn_q.weight", "rope_freqs.weight")}
    tensors = gguf_files.model_tensors("qwen2") | extra
    assert extra.keys() < open_checkpoint(gguf_files.write_model(tmp_path / "m.gguf", "qwen2", tensors=tensors)).names()
    tensors |= {"model.norm.weight": np.ones(32, np.float32)}
    path = gguf_files.write_model(tmp_path / "m.gguf", "qwen2", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"'output_norm.weight' and 'model.norm.weight' are both model\.norm"):
        open_checkpoint(path)


def test_rows_that_are_not_whole_heads_are_named(tmp_path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", metadata={"attention.head_count_kv": 2})
    checkpoint = open_checkpoint(path)
    for use in (checkpoint.read, checkpoint.blocks):
        with pytest.raises(CheckpointError, match=r"blk\.0\.attn_k\.weight has 16 rows for 2 heads of 16"):
            use("model.layers.0.self_attn.k_proj.weight")


def config_of(tmp_path: Path, architecture: str = "llama", tensors=None, **metadata) -> dict:
    metadata = {key.replace("__", "."): value for key, value in metadata.items()}
    path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, metadata=metadata)
    return open_checkpoint(path).config


def test_what_a_file_does_not_say(tmp_path) -> None:
    keys = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    config = config_of(tmp_path, **dict.fromkeys([*keys, "rope.dimension_count"]))
    assert config["num_key_value_heads"] == 2 and config["head_dim"] == 16 and config["rope_theta"] == 10_000
    assert config["rope_scaling"] is None and not config["attention_bias"]


def test_what_is_off_or_idle_changes_nothing(tmp_path) -> None:
    idle = {"expert_count": 0, "vocab_size": 12, "attention.causal": True, "rope.scaling.type": "none", "x.y": False}
    each = {"feed_forward_length": [64, 64], "attention.head_count_kv": [1, 1], "attention.sliding_window": 0}
    assert config_of(tmp_path, **idle, **each) == config_of(tmp_path)


def test_biases_by_their_presence(tmp_path) -> None:
    tensors = gguf_files.model_tensors() | {"blk.0.attn_output.bias": np.ones(32, np.float32)}
    config = config_of(tmp_path, tensors=tensors)
    assert config["attention_bias"] and not config["mlp_bias"]
    assert config_of(tmp_path, tensors=tensors | {"blk.0.ffn_down.bias": np.ones(32, np.float32)})["mlp_bias"]


def test_a_sliding_window_makes_it_mistral(tmp_path) -> None:
    model, config = find_model(config_of(tmp_path, attention__sliding_window=16))
    assert model.name == "mistral" and config.window == 16


def test_linear_rope_scaling(tmp_path) -> None:
    spellings = (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
    )
    for keys in spellings:
        assert Rope.from_hf(config_of(tmp_path, "qwen2", **keys)) == Rope(10_000.0, "linear", 4.0)
    for keys in ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 1.0}):
        assert config_of(tmp_path, "qwen2", **keys)["rope_scaling"] is None


def divisors(factor: float, theta: float, head_dim: int, original: int = 8192) -> np.ndarray:
    """Llama 3.1's scaling as its authors give it, one frequency after the other."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi / (1.0 / theta ** (i / head_dim))
        if wavelength < original / 4:
            found.append(1.0)
        elif wavelength > original / 1:
            found.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rope_scaling_is_recovered(tmp_path, factor) -> None:
    wanted = divisors(factor, 500_000.0, 16)
    assert len(set(wanted.tolist())) > 2  # some are blended
    tensors = gguf_files.model_tensors() | {"rope_freqs.weight": wanted}
    path = gguf_files.write_model(tmp_path / "m.gguf", tensors=tensors, metadata={"rope.freq_base": 500_000.0})
    checkpoint = open_checkpoint(path)
    assert "rope_freqs.weight" not in checkpoint.names()
    rope = find_model(checkpoint.config)[1].rope
    assert rope == Rope(500_000.0, "llama3", factor, 1.0, 4.0, 8192)
    np.testing.assert_allclose(rope.frequencies(16), Rope(500_000.0).frequencies(16) / wanted, rtol=1e-6)


def test_other_rope_factors_are_refused_and_ones_do_nothing(tmp_path) -> None:
    def config(values: np.ndarray, **more) -> dict:
        tensors = gguf_files.model_tensors() | {"rope_freqs.weight": np.asarray(values, np.float32)}
        return config_of(tmp_path, tensors=tensors, rope__freq_base=500_000.0, **more)

    assert config(np.ones(8))["rope_scaling"] is None
    for wrong in (divisors(8, 500_000.0, 16, original=4096), divisors(8, 1e6, 16), np.zeros(8), np.full(8, np.nan)):
        with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's rope scaling"):
            config(wrong)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is F32 \[7\], not F32 \[8\]"):
        config(np.ones(7))
    with pytest.raises(ConfigError, match="both rope_freqs"):
        config(np.ones(8), rope__scaling__factor=2.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, r"lacks llama\.expert_used_count; served is one whole number above 0"),
        ({"expert_shared_count": 1}, r"asks for what is not computed here: llama\.expert_shared_count = 1"),
        ({"logit_scale": 0.5, "x": "y"}, r"not computed here: llama\.logit_scale = 0\.5, llama\.x = 'y'"),
        ({"rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn'; served is none or linear"),
        ({"rope.scaling.attn_factor": 2.0}, r"llama\.rope\.scaling\.attn_factor is 2\.0; served is 1\.0"),
        ({"rope.scaling.factor": -1.0}, r"llama\.rope\.scaling\.factor is -1\.0; served is a number above 0"),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8; served is head_dim 16"),
        ({"attention.value_length": 8}, r"llama\.attention\.value_length is 8; served is head_dim 16"),
        ({"attention.causal": False}, r"llama\.attention\.causal is False; served is True"),
        (
            {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5},
            r"lacks llama\.attention\.layer_norm_rms_epsilon",
        ),
        ({"attention.layer_norm_rms_epsilon": math.nan}, r"layer_norm_rms_epsilon is nan; served is a number above 0"),
        ({"block_count": None}, r"lacks llama\.block_count; served is one whole number above 0"),
        ({"block_count": 2**32 - 1}, r"llama\.block_count is 4294967295, the tensors are 21"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0; served is one whole number above 0"),
        ({"attention.head_count_kv": [1, 2]}, r"llama\.attention\.head_count_kv is array\(\[1, 2\], .*one whole"),
        ({"attention.sliding_window": [4, 4, 0]}, r"llama\.attention\.sliding_window is array"),
        ({"context_length": "64"}, r"llama\.context_length is '64'"),
        (
            {"attention.key_length": 15, "attention.value_length": 15, "rope.dimension_count": 15},
            r"llama\.attention\.key_length is 15; served is an even one",
        ),
        ({"general.type": "adapter"}, "a GGUF of type 'adapter', not a model"),
    ],
)
def test_what_is_not_served_is_named(tmp_path, metadata, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, **metadata)


def test_an_architecture_that_is_not_served_is_named(tmp_path) -> None:
    with pytest.raises(
        ConfigError, match="architecture 'gemma' is not served; served are llama, qwen2, qwen3, qwen3moe"
    ):
        config_of(tmp_path, "gemma")
    with pytest.raises(ConfigError, match="architecture None is not served"):
        open_checkpoint(saved(tmp_path / "m.gguf", file_bytes()))
    with pytest.raises(ConfigError, match=r"qwen2\.attention\.sliding_window = 16"):
        config_of(tmp_path, "qwen2", attention__sliding_window=16)
    with pytest.raises(ConfigError, match=r"holds no matrix token_embd\.weight"):
        config_of(tmp_path, tensors={"x": np.ones(3, np.float32)})


# --- against models converted elsewhere -----------------------------------------------------------------------------

MODELS = ("stories260K", "babyllama361")
ERRORS = {"F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q5_0": 0.06, "Q4_0": 0.12, "Q4_1": 0.12, "IQ4_NL": 0.12}
"""Relative error of the whole tensor that each type may have."""


@pytest.mark.parametrize("model", MODELS)
def test_a_converted_model_is_the_one_it_was_made_of(shared_data, model) -> None:
    path = shared_data / "models" / model
    if not (path / f"{model}-f32.gguf").is_file():
        pytest.skip(f"no GGUF file of {model} in the reference data")
    source, checkpoint = open_checkpoint(path), open_checkpoint(path / f"{model}-f32.gguf")
    assert checkpoint.names() == source.names()
    for name in source.names():
        assert checkpoint.shape(name) == source.shape(name)
        np.testing.assert_array_equal(checkpoint.read(name), source.read(name))
    assert find_model(checkpoint.config)[1] == find_model(source.config)[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_quantised_model_is_near_its_source(shared_data, model) -> None:
    path = shared_data / "models" / model
    if not (path / f"{model}-Q8_0.gguf").is_file():
        pytest.skip(f"no GGUF file of {model} in the reference data")
    source = open_checkpoint(path)
    for file in path.glob("*-*.gguf"):
        kind = file.stem.rsplit("-", 1)[1]
        if kind == "f32":
            continue
        checkpoint = open_checkpoint(file)
        assert checkpoint.names() == source.names()
        kinds = set()
        for name in source.names():
            wanted, read = source.read(name).astype(np.float32), checkpoint.read(name).astype(np.float32)
            assert np.linalg.norm(read - wanted) <= ERRORS[kind] * np.linalg.norm(wanted), (kind, name)
            if (blocks := checkpoint.blocks(name)) is not None:
                kinds.add(blocks.format.name)
                np.testing.assert_array_equal(dequantise(blocks.format, blocks.rows), read)
        assert kind in kinds or kind in ("F16", "BF16")


# --- jaxserve show --------------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert cli.call(["show", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_show_tells_what_a_gguf_holds(tmp_path, capsys) -> None:
    metadata = {
        "general.license": "apache-2.0\nmore", "tokenizer.chat_template": "{{ x }}" * 50,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(12)], "general.tags": ["a\x1b[31m", "b"],
    }  # fmt: skip
    path = gguf_files.write_model(tmp_path / "m.gguf", metadata=metadata, kind="Q8_0")
    text = shown(capsys, path)
    for part in (
        r"architecture +llama", r"context length +64", r"embedding length +32", r"license +apache-2\.0\n",
        r"chat template +yes", r"types +Q8_0 99\.2 % \(16 tensors\), F32 0\.826 % \(5 tensors\)",
        r"tokenizer\.ggml\.tokens +12 of t0, t1, t2, t3, t4, t5, \.\.\.\n", r"layer_norm_rms_epsilon +1e-05",
        r"chat_template +\{\{ x .*\.\.\. \(350 characters\)", r"blk\.1\.ffn_up\.weight +64x32 Q8_0 +2,176\n",
        r"general\.tags +\[a\\x1b\[31m, b\]", r"21 tensors, 19,360 parameters",
    ):  # fmt: skip
        assert re.search(part, text), part
    assert "not served" not in text
    told = json.loads(shown(capsys, tmp_path, "--json"))
    assert told["parameters"] == sum(t.size for t in gguf_files.model_tensors().values())
    assert told["bytes"] == sum(t.nbytes for t in GgufFile(path).tensors.values())
    assert told["types"]["Q8_0"]["tensors"] == 16 and told["chat_template"] and told["not_served"] is None
    assert told["metadata"]["tokenizer.ggml.tokens"] == {"length": 12, "first": ["t0", "t1", "t2", "t3", "t4", "t5"]}
    assert len(told["metadata"]["tokenizer.chat_template"]) == 350
    assert told["tensors"][0] == {"name": "token_embd.weight", "shape": [12, 32], "type": "Q8_0", "bytes": 12 * 34}


def test_show_also_tells_of_what_is_not_served(tmp_path, capsys) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", "gemma3n", metadata={"gemma3n.x": math.inf})
    assert re.search(r"not served +.*architecture 'gemma3n' is not served", shown(capsys, path))
    told = json.loads(shown(capsys, path, "--json"))
    assert told["context_length"] == 64 and "gemma3n" in told["not_served"] and told["metadata"]["gemma3n.x"] == "inf"


def test_show_tells_what_a_directory_holds(tmp_path, capsys) -> None:
    config = {"architectures": ["Fake"], "hidden_size": 8, "rope_scaling": {"factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "LICENSE").write_text("\nThe MIT License\n\nCopyright")
    weights = {f"layers.{i}.w": np.ones((2, 8), ml_dtypes.bfloat16) for i in (10, 9)}
    save_file(weights | {"norm": np.ones(8, np.float32)}, tmp_path / "model.safetensors")
    text = shown(capsys, tmp_path)
    for part in (
        r"kind +safetensors", r"architecture +Fake", r"context length +not given", r"license +The MIT License\n",
        r"chat template +no", r"layers\.9\.w +2x8 BF16 +32\n  layers\.10\.w", r"3 tensors, 40 parameters, 96 bytes",
    ):  # fmt: skip
        assert re.search(part, text), part
    assert json.loads(shown(capsys, tmp_path, "--json"))["metadata"] == config


def test_show_says_what_is_wrong(tmp_path, capsys) -> None:
    assert cli.call(["show", str(saved(tmp_path / "m.gguf", b"GGUF"))]) == 2
    assert "m.gguf: truncated: 4 bytes" in capsys.readouterr().err
    assert cli.call(["show", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_show_loads_no_jax(tmp_path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf")
    program = "import sys; from jaxserve import cli; cli.call(sys.argv[1:]); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "show", path], capture_output=True, text=True)
    assert done.returncode == 0 and "blk.1.ffn_up.weight" in done.stdout, done.stderr


# --- damage of every kind -------------------------------------------------------------------------------------------


def mutant(rng: random.Random, good: bytes, places: list[int]) -> bytes:
    """The file with one thing wrong with it, or several. `places` are where counts, types and offsets are."""
    data = bytearray(good)
    header = places[-1] + 16
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(6)
        if kind == 0:  # a flipped bit, where most of the meaning is
            data[rng.randrange(min(header, len(data)))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 2:
            del data[rng.randrange(24, len(data)) :]
        elif kind == 3:  # a count, length or offset out of all proportion
            huge = rng.choice((2**64 - 1, 2**63, 2**63 - 1, 2**40, 2**32, 2**31, len(data), 0, 1, rng.randrange(2**16)))
            at = rng.choice(places)
            data[at : at + 8] = huge.to_bytes(8, "little")
        elif kind == 4:  # what belongs in one place in another
            source, at, size = rng.choice(places), rng.choice(places), rng.choice((4, 8))
            data[at : at + size] = good[source : source + size]
        else:  # a small number, as types and ranks are
            at = rng.choice(places)
            data[at : at + 4] = rng.randrange(40).to_bytes(4, "little")
        if len(data) < 32:
            break
    return bytes(data)


def places_in(data: bytes, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the reader takes a number from `data`: its counts, lengths, types and offsets."""
    from jaxserve import gguf as module

    taken: set[int] = set()
    one, strings = module._Cursor.one, module._Cursor.strings

    def noted(self, kind, what):
        taken.add(self.at)
        return one(self, kind, what)

    def noted_strings(self, count, what):
        taken.add(self.at)
        return strings(self, count, what)

    with monkeypatch.context() as patch:
        patch.setattr(module._Cursor, "one", noted)
        patch.setattr(module._Cursor, "strings", noted_strings)
        GgufFile(saved(path, data))
    return sorted(taken)


def use(path: Path, weights: bool = True) -> str:
    """Opens a file and uses all of it; what came of that."""
    try:
        checkpoint = GgufCheckpoint(path)
        for name in checkpoint.file.tensors:
            checkpoint.file.raw(name)
        if weights:
            "\n".join(lines(about(path)))
            for name in checkpoint.names():
                checkpoint.read(name)
                checkpoint.blocks(name)
        return "read"
    except (CheckpointError, ConfigError) as error:
        assert str(path) in error.message
        return type(error).__name__


def small_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, list[int]]:
    """A file with something of everything, and its places."""
    metadata = {
        "tokenizer.ggml.tokens": ["a", "b", "<unk>"], "tokenizer.ggml.scores": [0.5, 1.5], "rope.scaling.factor": 2.0,
        "attention.sliding_window": 8, "general.alignment": 32, "tokenizer.flag": True,
    }  # fmt: skip
    tensors = {n: t for n, t in gguf_files.model_tensors(tied=True).items() if not n.startswith("blk.1.")}
    gguf_files.write_model(path, tensors=tensors, metadata=metadata, kind="Q8_0")
    whole = path.read_bytes()
    places = places_in(whole, path, monkeypatch)
    assert use(path) == "read" and len(places) > 100
    return whole, places


def test_no_damage_gives_another_error(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    whole, places = small_model(path, monkeypatch)
    rng = random.Random(0)
    came = {"read": 0, "CheckpointError": 0, "ConfigError": 0}
    with path.open("r+b", buffering=0) as file:
        for i in range(10_000):
            file.seek(0)
            file.truncate(file.write(mutant(rng, whole, places)))
            came[use(path, weights=i % 8 == 0)] += 1
    assert min(came.values()) > 100, came


def test_no_number_takes_memory(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    whole, places = small_model(path, monkeypatch)
    for i, at in enumerate(places):
        huge = (2**31 - 1, 2**40, 2**63 - 1, 2**64 - 1)[i % 4]
        path.write_bytes(whole[:at] + huge.to_bytes(8, "little") + whole[at + 8 :])
        tracemalloc.start()
        use(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * len(whole), (at, huge, peak)
