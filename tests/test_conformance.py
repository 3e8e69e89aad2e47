"""The conformance kit: our own models and the examples pass, and what is planted in a model file is named."""

import json
from pathlib import Path

import pytest

from jaxserve import cli
from jaxserve.conformance import check_model
from jaxserve.model_code import load_model_code
from jaxserve.models import ARCHITECTURES, find_model
from jaxserve.weights import open_checkpoint

ROOT = Path(__file__).parent.parent
GOLDENS = sorted(p.parent for p in (ROOT / "tests" / "goldens").glob("*/config.json"))
TEMPLATE = (ROOT / "jaxserve" / "embedded" / "new_model.py").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_own_models_pass(name):
    configs = {p: json.loads((p / "config.json").read_text()) for p in GOLDENS}
    of_it = [p for p, hf in configs.items() if name in hf["architectures"]]
    path = min(of_it, key=lambda p: configs[p]["num_hidden_layers"])
    hf = configs[path]
    findings = list(check_model(find_model(hf)[0], hf, open_checkpoint(path)))
    assert {f.outcome for f in findings} == {"ok"}, [f for f in findings if f.outcome != "ok"]
    assert len(findings) == 15


@pytest.mark.parametrize("file", ["gpt_neox.py", "gpt2_nnx.py"])
def test_the_examples_pass_with_their_checkpoints(file):
    model = load_model_code(str(ROOT / "examples" / file))
    path = ROOT / "tests" / "goldens" / "examples" / file.removesuffix(".py").removesuffix("_nnx")
    findings = list(check_model(model, json.loads((path / "config.json").read_text()), open_checkpoint(path)))
    assert {f.outcome for f in findings} == {"ok"}, [f for f in findings if f.outcome != "ok"]
    trained = {key: value for key, value in model.example.items() if key != "architectures"}
    assert all(getattr(model.config_from_hf(trained), name) for name in ("layers", "vocab"))


MLP = '    h = rms_norm(x, p["mlp_norm"], c.eps)'
ROTATED = 'rotate(linear(h, p["{0}"], out=2), positions, c.rope)'
PLANTED = {
    "counts positions itself": (
        [("positions, c.rope", "jax.numpy.arange(h.shape[0]), c.rope")],
        "chunked is whole",
        ["from token 9 on", "forward never reads `positions`", "take them from the argument"],
    ),
    "reads the first layer's cache": (
        [("attend(layer, ", "attend(0, ")],
        "layers",
        ["called for layers 0, 0", "each of 0 to 1", "another's number"],
    ),
    "loses the cache": (
        [("o, cache = attend", "o, _ = attend")],
        "cache",
        ["keys and values of layer 0, 1", "hand the cache that each attend returns to the next"],
    ),
    "looks along T": (
        [(MLP, MLP.replace("(x, ", "(x - x.mean(axis=0)[None], "))],
        "padding",
        ["filled up with one token", "something other than `attend` looks along T"],
    ),
    "logits of rows meet": (
        [("return linear_f32(hidden", "return linear_f32(hidden - hidden.mean(axis=0)[None]")],
        "logits by row",
        ["logits of some rows", "those rows of the logits of all"],
    ),
    "promotes to float32": (
        [('embed(p["embed"], tokens)', 'embed(p["embed"], tokens).astype("float32")')],
        "bfloat16",
        [":126: attend of layer 0: q is float32; it must be bfloat16", "first meets another type at", ":119"],
    ),
    "rounds its logits": (
        [("return linear_f32(hidden", "return linear(hidden")],
        "bfloat16",
        ["logits is bfloat16; it must be float32", "linear_f32"],
    ),
    "multiplies a matrix by itself": (
        [('linear(h, p["up"])', 'jax.numpy.einsum("td,fd->tf", h, p["up"])')],
        "matrices",
        [":130: ", "declared with matrix()", "weight()"],
    ),
    "calls Python": (
        [(MLP, "    jax.debug.callback(print, x)\n" + MLP)],
        "no callbacks",
        ["debug_callback", "take jax.debug and callbacks out"],
    ),
    "branches on a value": (
        [(MLP, "    x = x if x[0, 0] > 0 else -x\n" + MLP)],
        "shapes",
        [":129: TracerBoolConversionError", "jax.lax.cond"],
    ),
    "has heads of its own": (
        [('"q": m("heads', '"q": m("kv_heads')],
        "shapes",
        [":126: attend of layer 0: q is [13, 2, 16]", "[T, heads, head_dim] = [13, 4, 16]: axis 1, heads, is 2"],
    ),
    "misspells an axis": (
        [('m("ffn width"', 'm("fnn width"')],
        "shapes",
        [":89: ", "mlp.gate_proj.weight: no size for axis 'fnn' in Config"],
    ),
    "has a spec that is none": (
        [('w("width", "model.norm.weight")', '"model.norm.weight"')],
        "shapes",
        ["['norm'] is a str, not a ParamSpec"],
    ),
    "returns no cache": (
        [("c.eps), cache\n\n\ndef block", "c.eps)\n\n\ndef block")],
        "shapes",
        ["forward returns [13, 64] of float32, not (hidden, cache)"],
    ),
    "lacks a size": (
        [("    kv_heads: int", "    kvheads: int"), ("kv_heads=hf", "kvheads=hf")],
        "config",
        ["Config lacks the size 'kv_heads'"],
    ),
    "asks for another key": (
        [('hf["rms_norm_eps"]', 'hf["norm_eps"]')],
        "config",
        [":69: Config.from_hf: KeyError: 'norm_eps'"],
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_what_is_planted_is_named(bug, tmp_path):
    changes, check, words = PLANTED[bug]
    text = TEMPLATE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "planted.py").write_text(text)
    model = load_model_code(str(tmp_path / "planted.py"))
    failed = {f.check: f.detail for f in check_model(model, model.example) if f.outcome == "FAIL"}
    assert check in failed, failed
    for word in words:
        assert word in failed[check]


def test_no_positions_at_all_is_noted_and_not_refused(tmp_path):
    text = TEMPLATE
    for name in "qk":
        text = text.replace(ROTATED.format(name), f'linear(h, p["{name}"], out=2)')
    (tmp_path / "planted.py").write_text(text)
    model = load_model_code(str(tmp_path / "planted.py"))
    findings = list(check_model(model, model.example))
    assert "FAIL" not in {f.outcome for f in findings}
    assert [f.check for f in findings if f.outcome == "note"] == ["positions"]


def test_the_command_says_what_fails_and_where(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(TEMPLATE.replace('"model.norm.weight"', '"model.norm"').replace('m("ffn width"', 'm("width ffn"'))
    llama3 = ROOT / "tests" / "goldens" / "llama2"
    assert cli.call(["check", str(file), "--checkpoint", str(llama3)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "FAIL checkpoint" in shown and "missing tensor (1): model.norm" in shown
    assert "unexpected tensor (1): model.norm.weight" in shown
    assert "mlp.gate_proj.weight is [64, 48], the model needs [48, 64]" in shown
    assert f"{file}: 2 of 3 checks failed" in shown

    file.write_text("import nothing_of_that_name\n")
    assert cli.call(["check", str(file)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "mine.py:1: ModuleNotFoundError: No module named 'nothing_of_that_name'" in shown
