"""What a model name means, and downloads against a stand-in of the hub: whole, resumed, offline and refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_stand_in import HubStandIn, Repo
from safetensors.numpy import save

from jaxserve.errors import ConfigError
from jaxserve.hub import choose_gguf, resolve_model
from jaxserve.weights import open_checkpoint

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model
try:
    names = [a for a in sys.argv[1:] if a != "--config"]
    print(resolve_model(*names, weights=names == sys.argv[1:]))
except ConfigError as error:
    print(error.message)
    sys.exit(3)
assert "jax" not in sys.modules
"""


def checkpoint():
    """The files of a small random Llama repository, those that nobody wants included."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (64, 48), "model.norm.weight": (48,)}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    shapes |= {f"model.layers.{i}.self_attn.{n}.weight": (48, 48) for i in range(2) for n in names}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    files = {shard: save({n: weights[n] for n in weights if shards[n] == shard}) for shard in set(shards.values())}
    files |= {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 48}).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": shards}).encode(),
        "tokenizer.json": b"{}",
        "tokenizer.model": b"sentencepiece",
        "chat_template.jinja": b"{{ messages }}",
        "merges.txt": b"a b",
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
    }
    unwanted = ("pytorch_model.bin", "m.gguf", "onnx/config.json", "original/x.safetensors", "consolidated.safetensors")
    return weights, files, files | dict.fromkeys(unwanted, b"unwanted")


SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def resolve(tmp_path):
    """Runs resolve_model in a process of its own, since huggingface_hub reads its environment once."""

    def run(hub, *arguments, offline=False, succeeds=True, token=None):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        environment = inherited | {
            "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == (0 if succeeds else 3), done.stdout + done.stderr
        return done.stdout.strip()

    return run


def test_a_repository_is_downloaded_and_then_served_offline(resolve, tmp_path):
    weights, wanted, files = checkpoint()
    with HubStandIn({"org/tiny-llama": Repo(files, revisions=("main", "v1"))}) as hub:
        path = Path(resolve(hub, "org/tiny-llama"))
        assert path.is_relative_to(tmp_path / "home")
        assert {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} == set(wanted)
        loaded = open_checkpoint(path)
        assert loaded.names() == frozenset(weights)
        for name, weight in weights.items():
            assert np.array_equal(loaded.read(name), weight)

        fetched = len(hub.gets(SHARD))
        assert resolve(hub, "org/tiny-llama", "v1") == str(path)
        assert len(hub.gets(SHARD)) == fetched == 1

        asked = len(hub.log)
        assert resolve(hub, "org/tiny-llama", offline=True) == str(path)
        assert len(hub.log) == asked
    assert resolve(hub, "org/tiny-llama") == str(path)  # the hub is gone, the cache is whole


def test_a_cut_connection_is_resumed_where_it_broke(resolve):
    whole = save({"w": np.arange(6 << 20, dtype=np.uint16)})
    with HubStandIn(
        {"org/m": Repo({"config.json": b"{}", "model.safetensors": whole})}, cut={"model.safetensors": 11 << 20}
    ) as hub:
        path = Path(resolve(hub, "org/m"))
        first, again = hub.gets("model.safetensors")
    # huggingface_hub keeps what it received in units of 10 MiB
    assert first is None and again == f"bytes={10 << 20}-"
    assert (path / "model.safetensors").read_bytes() == whole


def test_a_download_that_stopped_goes_on_with_what_it_lacks(resolve):
    """The hub goes away between two runs: the first fails, the second fetches only what the first had not finished."""
    _, wanted, files = checkpoint()
    first = {name: data for name, data in files.items() if name != SHARD}

    class Withheld(dict):  # listed, and not there
        def __contains__(self, name):
            return name in first

    with HubStandIn({"org/tiny-llama": Repo(Withheld(files))}) as hub:
        said = resolve(hub, "org/tiny-llama", succeeds=False)
        assert said.startswith("download of org/tiny-llama failed") and "run it again" in said
        said = resolve(hub, "org/tiny-llama", offline=True, succeeds=False)
        assert "org/tiny-llama is not in the cache" in said
    with HubStandIn({"org/tiny-llama": Repo(files)}) as hub:
        path = Path(resolve(hub, "org/tiny-llama"))
        assert hub.gets(SHARD) == [None]
        again = {name for name in wanted if hub.gets(name)} - {SHARD}
        assert len(again) < len(wanted) - 1
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    assert found == wanted


def test_refusals_name_the_cure(resolve):
    _, _, files = checkpoint()
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"", "model.onnx": b"", "mmproj-F16.gguf": b""}
    repos = {
        "org/tiny-llama": Repo(files),
        "org/gated": Repo(files, gated=True),
        "org/pickled": Repo(pickled),
        "org/empty": Repo({"config.json": b"{}"}),
    }
    with HubStandIn(repos) as hub:
        for token in (None, "hf_of_somebody"):  # 401 to strangers, 404 to others
            said = resolve(hub, "org/nothing", token=token, succeeds=False)
            assert said.startswith(
                f"no directory and no repository org/nothing on {hub.url}; if it is private, set HF_"
            )
        said = resolve(hub, "org/gated", succeeds=False)
        assert said == f"org/gated is gated: accept its terms at {hub.url}/org/gated, then set HF_TOKEN to your token"
        said = resolve(hub, "org/tiny-llama", "v9", succeeds=False)
        assert said == "org/tiny-llama has no revision 'v9'; give a branch, tag or commit"
        said = resolve(hub, "org/pickled", succeeds=False)
        assert "org/pickled holds no safetensors; it has pytorch_model.bin, model.onnx, mmproj-F16.gguf;" in said
        assert "; it has no weights;" in resolve(hub, "org/empty", succeeds=False)
        said = resolve(hub, "org/tiny-llama", "v1", offline=True, succeeds=False)
        assert "org/tiny-llama at revision 'v1' is not in the cache and HF_HUB_OFFLINE is set" in said
        assert said.endswith("HF_HUB_OFFLINE=0 hf download org/tiny-llama --revision v1")


def test_an_unreachable_hub_is_named(resolve):
    with socket.socket() as taken:  # bound and not listening: nobody answers on this port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = resolve(url, "org/tiny-llama", succeeds=False)
    assert f"org/tiny-llama is not complete in the cache and {url} did not serve it: Got: ConnectError" in said
    assert "HF_ENDPOINT" in said


GGUF_FILES = [
    "README.md", "mmproj-F16.gguf", "tiny-Q4_K_M.gguf", "tiny-q8_0.gguf", "tiny-UD-Q4_K_XL.gguf", "imatrix_x.gguf",
    "BF16/tiny-BF16-00001-of-00002.gguf", "BF16/tiny-BF16-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        (None, "tiny-Q4_K_M.gguf"),
        ("latest", "tiny-Q4_K_M.gguf"),
        ("q4_k_m", "tiny-Q4_K_M.gguf"),
        ("Q8_0", "tiny-q8_0.gguf"),
        ("Q4_K_XL", "tiny-UD-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "tiny-UD-Q4_K_XL.gguf"),
        ("bf16", "BF16/tiny-BF16-00001-of-00002.gguf"),
    ],
)
def test_a_kind_of_quantisation_names_a_file(kind, chosen):
    found = choose_gguf("org/repo", GGUF_FILES, kind, None)
    assert found[0] == chosen and len(found) == (2 if "BF16" in chosen else 1)
    assert choose_gguf("org/repo", GGUF_FILES, None, found[-1]) == found


def test_files_that_cannot_be_chosen():
    held = "it has tiny-BF16-00001-of-00002.gguf, tiny-Q4_K_M.gguf, tiny-UD-Q4_K_XL.gguf, tiny-q8_0.gguf"
    for names, kind, file, said in (
        (GGUF_FILES, "Q4_K", None, f"org/repo holds no Q4_K; {held}; name one as org/repo:KIND or org/repo/FILE"),
        (GGUF_FILES, "F16", None, "holds no F16"),  # a projector is no model, and BF16 another kind
        (GGUF_FILES, None, "tiny.gguf", f"org/repo holds no tiny.gguf; {held}"),
        (GGUF_FILES, None, "mmproj-F16.gguf", "holds no mmproj-F16.gguf"),
        (
            ["a-Q8_0.gguf", "b-Q8_0.gguf"],
            "Q8_0",
            None,
            "several Q8_0: a-Q8_0.gguf, b-Q8_0.gguf; name one as org/repo/F",
        ),
        (["a-Q8_0.gguf", "b-Q5_0.gguf"], None, None, "holds no Q4_K_M; it has a-Q8_0.gguf, b-Q5_0.gguf"),
        (["a-Q8_0.gguf"], "Q5_0", None, "holds no Q5_0"),
        (GGUF_FILES[:-1], "BF16", None, "of the 2 shards of BF16/tiny-BF16-00001-of-00002.gguf 1 are there"),
        (["mmproj.gguf"], "Q8_0", None, "holds no GGUF file of a model"),
    ):
        with pytest.raises(ConfigError) as error:
            choose_gguf("org/repo", names, kind, file)
        assert said in error.value.message
    assert choose_gguf("org/repo", ["a-Q8_0.gguf"], None, None) == ["a-Q8_0.gguf"]


def test_gguf_files_come_from_the_hub(resolve):
    files = {name: name.encode() for name in GGUF_FILES} | {"config.json": b"{}"}
    with HubStandIn({"org/tiny-GGUF": Repo(files)}) as hub:
        path = Path(resolve(hub, "hf.co/org/tiny-GGUF:BF16"))
        assert path.name == "tiny-BF16-00001-of-00002.gguf" and path.read_bytes() == files["BF16/" + path.name]
        assert sorted(f.name for f in path.parents[1].rglob("*.gguf")) == [path.name, "tiny-BF16-00002-of-00002.gguf"]
        path = Path(resolve(hub, "org/tiny-GGUF/tiny-q8_0.gguf"))
        assert path.name == "tiny-q8_0.gguf"
        assert Path(resolve(hub, "org/tiny-GGUF")).name == "tiny-Q4_K_M.gguf", "no safetensors: the default kind"
        fetched = {name for name in GGUF_FILES if hub.gets(name)}
        assert fetched == {"tiny-q8_0.gguf", "tiny-Q4_K_M.gguf", *GGUF_FILES[-2:]}
        said = resolve(hub, "org/tiny-GGUF:Q2_K", succeeds=False)
        assert said.startswith("org/tiny-GGUF holds no Q2_K; it has tiny-BF16-00001-of-00002.gguf, tiny-Q4_K_M.gguf")
        assert resolve(hub, "org/other:Q2_K", succeeds=False).startswith("no directory and no repository org/other on")
        asked = len(hub.log)
        assert resolve(hub, "org/tiny-GGUF:q8_0", offline=True) == str(path) and len(hub.log) == asked
    assert resolve(hub, "org/tiny-GGUF:q8_0") == str(path)  # the hub is gone, the cache is whole
    said = resolve(hub, "org/other-GGUF:q8_0", offline=True, succeeds=False)
    assert said.startswith("org/other-GGUF is not in the cache and HF_HUB_OFFLINE is set")


def test_a_plan_downloads_the_config_and_no_weight(resolve, tmp_path):
    _, _, files = checkpoint()
    with HubStandIn({"org/tiny-llama": Repo(files), "org/tiny-GGUF": Repo({"tiny-Q8_0.gguf": b""})}) as hub:
        path = Path(resolve(hub, "org/tiny-llama", "--config"))
        found = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
        assert found == {"config.json", "modules.json", "1_Pooling/config.json"}
        for name in ("org/tiny-GGUF", "org/tiny-GGUF:Q8_0"):
            said = resolve(hub, name, "--config", succeeds=False)
            assert said.startswith(name) and "name the repository that it was made from" in said
        assert not hub.gets("tiny-Q8_0.gguf")
    file = tmp_path / "config.json"
    file.write_text("{}")
    assert resolve_model(str(file), weights=False) == file


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model("org/model") == Path("org/model")
    assert resolve_model(".") == Path(".")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"
    with pytest.raises(ConfigError, match="revision 'main' needs a Hugging Face id"):
        resolve_model(str(tmp_path), "main")


def test_names_that_mean_nothing(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.gguf").touch()
    assert resolve_model(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match="revision 'main' needs a Hugging Face id; .*model.gguf is a file"):
        resolve_model(str(tmp_path / "model.gguf"), "main")
    for name, said in {
        str(tmp_path / "config.json"): "is no GGUF file; give one",
        "none.gguf": "no such file: none.gguf",
        "/there/is/none.gguf": "no such file: /there/is/none.gguf",
        "there/is/none.gguf": "there/is is not in the cache and HF_HUB_OFFLINE is set",
        "org/model:": "not a Hugging Face id",
        "org/model:Q4 0": "not a Hugging Face id",
        str(tmp_path / "none"): "no such directory: /",
        "./none": "no such directory",
        "../none": "no such directory",
        "~/surely/none": "no such directory",
        "": "no such directory",
        "a/b/c": "not a Hugging Face id",
        "org/": "not a Hugging Face id",
        "org/mo del": "not a Hugging Face id",
        "org/a--b": "not a Hugging Face id",
        "-rf": "not a Hugging Face id",
        "https://huggingface.co/org/model": "not a Hugging Face id",
    }.items():
        with pytest.raises(ConfigError, match=said):
            resolve_model(name)


def test_the_embedded_model_or_a_message(tmp_path, monkeypatch):
    import jaxserve.hub

    monkeypatch.setattr(jaxserve.hub.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match="lacks the embedded model"):
        resolve_model(None)
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "config.json").write_text("{}")
    assert resolve_model(None) == tmp_path / "embedded"
    with pytest.raises(ConfigError, match="the embedded model has none"):
        resolve_model(None, "main")


def test_the_embedded_models_name_is_that_of_it_unless_something_here_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("jaxserve-tiny") == resolve_model(None)
    with pytest.raises(ConfigError, match="the embedded model has none"):
        resolve_model("jaxserve-tiny", "main")
    (tmp_path / "jaxserve-tiny").mkdir()
    assert resolve_model("jaxserve-tiny") == Path("jaxserve-tiny")
