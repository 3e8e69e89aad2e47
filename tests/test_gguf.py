"""GGUF files as containers: what is in them as it is, and everything wrong with them named."""

import math
import random
import time
import tracemalloc
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, F32, F64, I8, I64, STRING, U8, U16, U32, U64, entry, file_bytes, saved, tensor
from safetensors.numpy import save_file

from jaxserve.cli.show import about, lines
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import FORMATS
from jaxserve.gguf import GgufFile, find_gguf
from jaxserve.weights import open_checkpoint
from jaxserve.weights.gguf import GgufCheckpoint

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
    found = dict(metadata)
    assert time.process_time() - begun < 1
    assert found["tokens"] == words and found["merges"] == merges and found["types"][-1] == 151_935
    assert metadata["tokens"] is found["tokens"] and "merges" in metadata and len(metadata) == 3, "decoded once"


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
