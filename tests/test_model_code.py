"""Models outside the package, as their authors meet them: a file is written, served, edited, and full of mistakes."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from running_engine import Running
from running_server import Server

from jaxserve import LLM, SamplingParams, attention, cli, loading, native
from jaxserve.batch_job.identity import describe, differences
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions
from jaxserve.conformance import check_model
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.hub import resolve_model
from jaxserve.model_code import code_digest, load_model_code, sources_digest
from jaxserve.models import find_model
from jaxserve.models.from_nnx import Kernel, from_nnx
from jaxserve.weights import open_checkpoint
from jaxserve.weights.load import load_params

ROOT = Path(__file__).parent.parent
EXAMPLES = {"gpt_neox": "gpt_neox.py", "gpt2": "gpt2_nnx.py"}
TEMPLATE = (ROOT / "jaxserve" / "embedded" / "new_model.py").read_text()


def golden_of(name):
    path = ROOT / "tests" / "goldens" / "examples" / name
    return path, np.load(path / "golden.npz"), str(ROOT / "examples" / EXAMPLES[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_equal_transformers(name):
    path, golden, code = golden_of(name)
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config, code)
    params = load_params(model, config, checkpoint, dtype=np.float32, device_put=lambda a, spec: jnp.asarray(a))

    @jax.jit
    def run(params, tokens):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden, _ = model.forward(params, config, tokens, positions, jnp.zeros(()), attention.dense)
        return model.logits(params, config, hidden)

    for tokens, want in zip(golden["tokens"], golden["logits"], strict=True):
        assert np.abs(np.asarray(run(params, jnp.asarray(tokens))) - want).max() <= 2e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_engine_serves_the_examples(name):
    path, golden, code = golden_of(name)
    with Running(path, pages=64, seqs=2, warmup="lazy", code=code) as engine:
        for i in range(2):
            got = engine.one(golden["tokens"][i].tolist(), max_tokens=8, ignore_eos=True)
            assert got.tokens == golden["greedy"][i][:8].tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `jaxserve new-model` leaves."""
    path = tmp_path_factory.mktemp("new")
    assert cli.call(["new-model", "my-model", str(path)]) == 0
    return path / "my_model.py", path / "my-model-random"


SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128, "num_kv_pages": 32, "warmup": "lazy"}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_from_nothing_to_a_served_model(made, capsys):
    file, checkpoint = made
    assert "class Config" in file.read_text() and "NewModel" not in file.read_text()
    assert cli.call(["check", str(file), "--checkpoint", str(checkpoint)]) == 0
    assert "all 16 checks passed" in capsys.readouterr().out
    with LLM(str(checkpoint), model_code=str(file), **SMALL) as llm:
        assert llm.info.architecture == "my_model"
        want = llm.generate("Once upon", SamplingParams(temperature=0, max_tokens=8)).outputs[0].token_ids
    with Server(*FLAGS, f"--model-code={file}", model=checkpoint) as server:
        assert server.complete("Once upon", temperature=0, max_tokens=8)["token_ids"] == want


def test_check_needs_no_kernels(made, monkeypatch):
    monkeypatch.setattr(native, "_library", None)  # as in a process that has just begun, or where there is no compiler
    assert cli.call(["check", str(made[0]), "--checkpoint", str(made[1])]) == 0


def test_nothing_is_written_over(made, capsys, tmp_path):
    file, checkpoint = made
    assert cli.call(["new-model", "my-model", str(file.parent)]) == 2
    assert "my_model.py exists already" in capsys.readouterr().err
    assert cli.call(["new-checkpoint", str(file), str(checkpoint)]) == 2
    assert "my-model-random exists already" in capsys.readouterr().err
    assert cli.call(["new-model", "../x", str(tmp_path)]) == 2
    assert "'../x' cannot name a model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_random_checkpoints_need_a_vocabulary_that_holds_the_tokenizer(tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(TEMPLATE.replace('"vocab_size": 2048', '"vocab_size": 100'))
    assert cli.call(["new-checkpoint", str(file), str(tmp_path / "out")]) == 2
    assert "let vocab_size be 2048 or more" in capsys.readouterr().err
    file.write_text(TEMPLATE.replace("EXAMPLE =", "SIZES ="))
    assert cli.call(["new-checkpoint", str(file), str(tmp_path / "out")]) == 2
    assert "has no EXAMPLE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WRONG = {
    "a syntax error": (TEMPLATE.replace("return cls(", "return cls((", 1), r"mine\.py:\d+: SyntaxError: "),
    "an import": ("\nimport nothing_of_that_name\n", r"mine\.py:2: ModuleNotFoundError: .*nothing_of_that_name"),
    "an exit": ("import sys\nsys.exit(3)\n", r"mine\.py:2: SystemExit: 3"),
    "no logits": (TEMPLATE.replace("def logits", "def the_logits"), "model file mine lacks logits"),
    "no from_hf": (TEMPLATE.replace("def from_hf", "def of"), "model file mine lacks Config.from_hf"),
    "other arguments": (
        TEMPLATE.replace("positions: jax.Array, cache: Cache, attend: Attend\n) -> tuple", "attend\n) -> tuple"),
        r"mine\.py:\d+: forward is called as forward\(params, config, tokens, positions, cache, attend\): too many",
    ),
    "a key": (
        TEMPLATE.replace('"rms_norm_eps"]', '"eps"]'),
        r"mine\.py:69: config.json has no 'eps', which Config.from_hf",
    ),
    "a type": (
        TEMPLATE.replace('ffn=hf["intermediate_size"]', 'ffn=hf["intermediate_size"] + "0"'),
        r"mine\.py:\d+: Config.from_hf does not take this config.json: TypeError",
    ),
    "a shape": (
        TEMPLATE.replace("out=2), positions, c.rope)", "out=1).reshape(-1, 2, 32), positions, c.rope)"),
        r"a weight \[4, 16, 64\] of 64 outputs was multiplied as one of 4|q is \[13, 2, 32\]",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_named_before_a_weight_is_read(mistake, made, tmp_path, monkeypatch):
    text, message = WRONG[mistake]
    assert text != TEMPLATE
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(loading, "load_params", lambda *args, **rest: pytest.fail("weights were read"))
    options = ModelOptions(model_code=str(tmp_path / "mine.py"))
    with pytest.raises(ConfigError, match=message):
        loading.load_model(options, DeviceOptions(), made[1], lambda message: None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("{}/none.py", "cannot read .*none.py: No such file"),
        ("no_such_module", "'no_such_module' is no file, and there is no module 'no_such_module'"),
        ("jaxserve.models.none", "no module 'jaxserve.models.none'"),
        ("{}/my_model.py:Model", "my_model.py has no 'Model'; it has "),
        ("{}/my_model.py:block", "model file block lacks Config, param_specs, forward, logits"),
    ],
)
def test_what_cannot_be_found(code, message, made):
    with pytest.raises(ConfigError, match=message):
        load_model_code(code.format(made[0].parent))


def test_a_mistake_ends_the_command_with_its_place(made, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(TEMPLATE.replace("attend(layer, ", "attend(layer + 7, "))
    assert cli.call(["run", str(made[1]), f"--model-code={tmp_path / 'mine.py'}", "Hello", *FLAGS]) == 2
    assert "mine.py:126: attend is called with layer 7; the config has layers 0 to 1" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="missing tensor .1.: model.other"):
        (tmp_path / "mine.py").write_text(TEMPLATE.replace('"model.norm.weight"', '"model.other"'))
        LLM(str(made[1]), model_code=str(tmp_path / "mine.py"), **SMALL)


def test_an_object_of_a_file_and_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_mine.py").write_text("NAME = 'model.embed_tokens.weight'\n")
    (tmp_path / "mine.py").write_text(
        "from types import SimpleNamespace\nfrom beside_mine import NAME\nfrom jaxserve.models import llama\n"
        "class zoo:\n    small = SimpleNamespace(Config=llama.Config, param_specs=llama.param_specs,\n"
        "        forward=llama.forward, logits=llama.logits)\nsmall = zoo.small\n"
    )
    assert load_model_code(f"{tmp_path}/mine.py:zoo.small").name == "zoo.small"
    with pytest.raises(ConfigError, match="mine lacks .*; say .*mine.py:small"):
        load_model_code(f"{tmp_path}/mine.py")


def test_an_edited_file_is_read_again_at_once(tmp_path):
    file = tmp_path / "mine.py"
    for eps in ("1e-5", "2e-5"):  # of the same length, and within a second
        file.write_text(TEMPLATE.replace("1e-5", eps))
        assert load_model_code(str(file)).example["rms_norm_eps"] == float(eps)


def test_an_offline_job_depends_on_what_the_file_holds(made, tmp_path):
    file, other = tmp_path / "mine.py", tmp_path / "renamed.py"

    def described(code):
        model = ModelOptions(model_code=None if code is None else str(code))
        return describe("input", made[1], "name", EngineOptions(model=model), {})

    file.write_text(TEMPLATE)
    other.write_text(TEMPLATE)
    before = described(file)
    assert before == described(other) != described(None)
    file.write_text(TEMPLATE.replace("jax.nn.silu", "jax.nn.gelu"))
    assert [line.split(" was ")[0] for line in differences(before, described(file))] == ["model code"]
    with pytest.raises(ConfigError, match="cannot read .*none.py"):
        described(tmp_path / "none.py")


def test_and_on_what_it_imports_from_beside_it(tmp_path, monkeypatch):
    files = {
        "of_parts.py": "import parts\nfrom parts.mlp import gate\nimport numpy\n",
        "parts/__init__.py": "",
        "parts/mlp.py": "from . import norms\nfrom .. import far\n",
        "parts/norms.py": "import of_parts\n",
        "unused.py": "",
    }
    (tmp_path / "parts").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    codes = (str(tmp_path / "of_parts.py"), "of_parts.py", "of_parts")
    before = [sources_digest(code) for code in codes]
    assert len(set(before)) == 1
    alone = code_digest("of_parts.py")
    for name in files:
        (tmp_path / name).write_text(files[name] + "# edited\n")
        assert all((sources_digest(code) != before[0]) == (name != "unused.py") for code in codes), name
        assert (code_digest("of_parts.py") != alone) == (name == "of_parts.py"), "what a server watches is the file"
        (tmp_path / name).write_text(files[name])
    (tmp_path / "parts" / "norms.py").write_text("a syntax error")
    assert sources_digest("of_parts.py") != before[0]


def test_programs_of_foreign_code_are_known_by_what_they_compute():
    """Not by a digest of our sources, even where every function is one of ours."""
    load = [DeviceOptions(), resolve_model(None), lambda message: None]
    assert loading.load_model(ModelOptions(), *load).programs.whole
    assert not loading.load_model(ModelOptions(model_code="jaxserve.models.llama"), *load).programs.whole


@dataclass(frozen=True)
class Sizes:
    layers: int = 1
    width: int = 12
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 6
    vocab: int = 32
    max_positions: int = 64

    @classmethod
    def from_hf(cls, hf):
        return cls()


class Decoder(nnx.Module):
    def __init__(self, c, *, rngs):
        self.embed = nnx.Embed(c.vocab, c.width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(c.width, (3, c.heads, c.head_dim), rngs=rngs)
        self.out = nnx.LinearGeneral((c.heads, c.head_dim), c.width, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(c.width, c.width, use_bias=False, rngs=rngs)  # square: no shape tells how it lies
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.table = nnx.Variable(
            jnp.sin(jnp.arange(c.max_positions * c.width, dtype=jnp.float32)).reshape(-1, c.width)
        )

    def __call__(self, tokens, positions, cache, attend):
        x = self.embed(tokens) + self.table[...][positions]
        q, k, v = jnp.moveaxis(self.qkv(x), 1, 0)
        o, cache = attend(0, q, k, v, cache)
        return x + self.drop(self.up(self.out(o))), cache

    def logits(self, hidden):
        return self.embed.attend(hidden)


NAMES = {
    "embed.embedding": "embed",
    "qkv.kernel": Kernel("qkv"),
    "qkv.bias": "qkv_bias",
    "out.kernel": Kernel("out", inputs=2),
    "out.bias": "out_bias",
    "up.kernel": Kernel("up"),
}


def test_nnx_modules_as_torch_would_have_stored_them():
    c = Sizes()
    tokens, positions = jnp.array([3, 1, 4, 1, 5]), jnp.arange(5)

    @jax.jit
    def direct():
        """The weights as torch would store them, and what the module itself computes."""
        module = Decoder(c, rngs=nnx.Rngs(3))
        module.eval()
        state = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
        stored = {
            "embed": state["embed", "embedding"][...],
            "qkv": state["qkv", "kernel"][...].reshape(12, 36).T,
            "qkv_bias": state["qkv", "bias"][...],
            "out": state["out", "kernel"][...].reshape(12, 12).T,
            "out_bias": state["out", "bias"][...],
            "up": state["up", "kernel"][...].T,
        }
        with jax.numpy_dtype_promotion("standard"):
            hidden, _ = module(tokens, positions, jnp.zeros(()), attention.dense)
            return stored, module.logits(hidden)

    stored, want = direct()
    _, param_specs, forward, logits = from_nnx(Sizes, Decoder, NAMES.__getitem__)
    specs = param_specs(c)
    assert {s.name: s.shape for s in specs.values()} == {
        "embed": (32, 12), "qkv": (3, 2, 6, 12), "qkv_bias": (3, 2, 6), "out": (12, 2, 6), "out_bias": (12,),
        "up": (12, 12),
    }  # fmt: skip

    @jax.jit
    def run(stored):
        params = {path: stored[spec.name].reshape(spec.shape) for path, spec in specs.items()}
        hidden, _ = forward(params, c, tokens, positions, jnp.zeros(()), attention.dense)
        return logits(params, c, hidden)

    assert np.allclose(run(stored), want, atol=1e-5)


def test_nnx_modules_that_are_refused():
    class Bare(nnx.Module):
        def __init__(self, c, *, rngs):
            self.inner = Decoder(c, rngs=rngs)
            self.inner.scale = jnp.ones(3)

    with pytest.raises(ConfigError, match="Decoder: inner.scale is a bare array; make it an nnx.Variable"):
        from_nnx(Sizes, Bare).param_specs(Sizes())
    with pytest.raises(ConfigError, match="up.kernel has 2 axes, of which a Kernel cannot have 2 inputs"):
        from_nnx(Sizes, Decoder, lambda path: Kernel(path, 2) if path == "up.kernel" else path).param_specs(Sizes())


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_without_output_matrix_has_the_names_that_the_file_gives(prefix, tmp_path):
    """As it was published, or as the whole model's would be."""
    file = tmp_path / "mine.py"
    text = (ROOT / "jaxserve" / "models" / "qwen3.py").read_text()
    file.write_text(text.replace('"model.', f'"{prefix}').replace("tied=bool(hf.get(", "tied=True or bool(hf.get("))
    path = ROOT / "tests" / "goldens" / "embeddings" / "qwen3"
    options = ModelOptions(model_code=str(file), task="embed")
    loaded = loading.load_model(options, DeviceOptions(attention="reference"), path, lambda message: None)
    want = loading.load_model(ModelOptions(), DeviceOptions(attention="reference"), path, lambda message: None)
    assert loaded.embedding.pooling == "last"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, want.params)
    first = next(check_model(loaded.model, None, open_checkpoint(path)))
    assert (first.check, first.outcome) == ("checkpoint", "ok"), first
