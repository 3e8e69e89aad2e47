"""`jaxserve show`: what it tells of GGUF files, directories and what is not served."""

import json
import math
import re
import subprocess
import sys

import gguf_files
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import cli
from jaxserve.gguf import GgufFile


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_DATA", raising=False)


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
    assert cli.call(["show", str(gguf_files.saved(tmp_path / "m.gguf", b"GGUF"))]) == 2
    assert "m.gguf: truncated: 4 bytes" in capsys.readouterr().err
    assert cli.call(["show", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_show_loads_no_jax(tmp_path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf")
    program = "import sys; from jaxserve import cli; cli.call(sys.argv[1:]); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "show", path], capture_output=True, text=True)
    assert done.returncode == 0 and "blk.1.ffn_up.weight" in done.stdout, done.stderr
