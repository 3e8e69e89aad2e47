"""The command line: where settings come from, what errors look like, and each command with a fake engine behind it."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fake_engine import FIRST_BYTE, FakeEngine, ids_of, write_tokenizer

from jaxserve import __version__, cli
from jaxserve.cli import generate, options, run, serve
from jaxserve.config import (
    DeviceOptions,
    EngineOptions,
    HostOptions,
    HostPlace,
    ModelOptions,
    ScheduleOptions,
    ServerOptions,
)
from jaxserve.errors import ConfigError, EngineStopped, UnsupportedParameter
from jaxserve.request import SamplingParams
from jaxserve.text import TextModel

SECTIONS = (ModelOptions, ScheduleOptions, DeviceOptions, HostOptions, ServerOptions)


pytestmark = pytest.mark.usefixtures("no_variables")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[EngineOptions, ServerOptions, str]]]:
    """Calls `jaxserve serve ...` up to the point where work would begin; returns what it was told."""

    def parse(*argv: str) -> tuple[EngineOptions, ServerOptions, str]:
        told: list[tuple[EngineOptions, ServerOptions, str]] = []

        async def instead(engine: EngineOptions, server: ServerOptions, name: str, begun: object) -> None:
            assert begun is None
            told.append((engine, server, name))

        monkeypatch.setattr(serve, "_serve", instead)
        code = cli.call(["serve", *argv])
        assert code == 0
        return told[0]

    yield parse


def model_of(tmp_path: Path, engine: FakeEngine | None = None, template: bool = True) -> TextModel:
    path = write_tokenizer(tmp_path / "counter")
    if not template:
        config = json.loads((path / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return TextModel.open(path, engine or FakeEngine(), "counter")


def says(text: str) -> Callable[[object, int], list[int]]:
    return lambda request, k: [FIRST_BYTE + b for b in text.encode()]


# --- where settings come from ---------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_dataclasses(served) -> None:
    engine, server, name = served()
    assert engine == EngineOptions()
    assert server == ServerOptions()
    assert name == "jaxserve-tiny"


def test_flag_wins_over_variable_over_file_over_default(served, tmp_path, monkeypatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text("port = 1\nhost = 'file'\nmax_num_seqs = 3\n[device]\nblock-size = 32\n")
    monkeypatch.setenv("JAXSERVE_HOST", "variable")
    monkeypatch.setenv("JAXSERVE_PORT", "2")
    engine, server, _ = served("--config", str(file), "--port", "3")
    assert (server.port, server.host) == (3, "variable")
    assert engine.schedule.max_num_seqs == 3
    assert engine.device.block_size == 32
    assert engine.device.warmup == DeviceOptions().warmup


def test_config_file_named_by_a_variable(served, tmp_path, monkeypatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text("model = 'org/name'\n[schedule]\nenable_prefix_caching = false\n[server]\nin_process = true\n")
    monkeypatch.setenv("JAXSERVE_CONFIG", str(file))
    engine, server, name = served("--no-in-process")
    assert engine.model.model == name == "org/name"
    assert not engine.schedule.enable_prefix_caching
    assert not server.in_process


@pytest.mark.parametrize("argv", [["org/name"], ["--model", "org/name"], ["--model=org/name"]])
def test_model_as_argument_or_flag(served, argv) -> None:
    engine, _, name = served(*argv, "--revision", "v2", "--no-enable-prefix-caching")
    assert engine.model == ModelOptions(model="org/name", revision="v2")
    assert not engine.schedule.enable_prefix_caching
    assert name == "org/name"


def test_a_place_among_hosts_from_flags_variables_and_a_file(served, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "a.toml"
    file.write_text("mesh = '1x8'\n[hosts]\nhosts = 2\ncoordinator = '10.0.0.1:77'\n")
    monkeypatch.setenv("JAXSERVE_HOST_SECRET", "s")
    engine, _, _ = served("--config", str(file), "--host-index", "0", "--host-timeout", "5")
    assert engine.place == HostPlace(
        index=0, count=2, coordinator="10.0.0.1", port=77, secret="s", timeout_s=5, start_timeout_s=600
    )
    assert cli.call(["serve", "--config", str(file), "--host-index", "0", "--mesh", "2x4"]) == 2
    assert "several hosts are one replica over all their devices" in capsys.readouterr().err


def test_served_name(served, tmp_path) -> None:
    assert served(str(tmp_path) + "/")[2] == tmp_path.name
    assert served(str(tmp_path), "--served-model-name", "gpt")[2] == "gpt"


def test_shipped_configurations_are_valid(served) -> None:
    files = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
    assert files
    for file in files:
        served("--config", str(file))


def test_a_file_may_hold_keys_of_other_commands(tmp_path, capsys) -> None:
    file = tmp_path / "a.toml"
    file.write_text("temperature = 0.5\nport = 0\n")
    assert cli.call(["doctor", "--config", str(file)]) in (0, 1)
    assert "any free port" in capsys.readouterr().out


def test_help_shows_every_option_with_its_docstring(capsys) -> None:
    assert cli.call(["serve", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for section in SECTIONS:
        for name, doc in field_docs(section).items():
            assert "--" + name.replace("_", "-") in shown
            assert " ".join(doc.replace("`", "").split())[:40] in shown, name


def field_docs(section: type) -> dict[str, str]:
    import ast
    import inspect

    body = ast.parse(inspect.getsource(section)).body[0].body
    return {
        a.target.id: b.value.value
        for a, b in zip(body, body[1:], strict=False)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }


@pytest.mark.parametrize(
    "command", [[], ["run"], ["generate"], ["batch"], ["bench"], ["bench", "serve"], ["convert"], ["doctor"]]
)
def test_every_command_has_help(command, capsys) -> None:
    assert cli.call([*command, "--help"]) == 0
    assert "Usage: jaxserve" in capsys.readouterr().out


def test_a_command_may_have_another_default_and_the_engine_gets_plain_options(monkeypatch) -> None:
    seen: list[EngineOptions] = []

    def refuse(options: EngineOptions, name: str) -> None:
        seen.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr(run, "opened", refuse)
    assert cli.call(["run", "a b", "--block-size=8"]) == 2
    assert cli.call(["run", "a b", "--warmup=min"]) == 2
    assert seen[0] == EngineOptions(device=DeviceOptions(block_size=8, warmup="lazy"))
    assert seen[1] == EngineOptions(device=DeviceOptions(warmup="min"))


def test_flags_rebuild_the_options(served) -> None:
    engine, server, _ = served(
        "--dtype=bfloat16", "--max-num-seqs=7", "--no-enable-prefix-caching", "--compile-cache-dir=", "--port=0"
    )
    again = served(*options.as_flags(engine.model, engine.schedule, engine.device, server))
    assert again[:2] == (engine, server)


# --- what errors look like ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--max-model-len", "0"], "max_model_len must be at least 1, got 0"),
        (["serve", "--max-model-len", "many"], "--max-model-len"),
        (["serve", "--dtype", "int4"], "bfloat16"),
        (["serve", "--max-modle-len", "4"], "--max-model-len"),
        (["serve", "--port", "70000"], "port must be in [0, 65535]"),
        (["serve", "--shutdown-timeout", "-1"], "shutdown_timeout must be a number of seconds, 0 or more, got -1"),
        (["serve", "one", "two"], "two"),
        (["serve", "./not-here"], "no such directory"),
        (["serve", "--config", "/no/such.toml"], "/no/such.toml"),
        (["run", "--temperature", "-1", "hello there"], "temperature"),
        (["run", "./not-here", "hello"], "no such directory"),
        (["run", "--model", "./not-here", "hello"], "no such directory"),
        (["run", "What", "is", "it?"], "put a prompt of several words into quotes"),
        (["generate", "/no/such/file"], "cannot open /no/such/file"),
        (["generate", "x", "--n", "1000"], "--n"),
        (["generate", "--tmperature", "0", "x"], "--temperature"),
        (["generate", __file__, "-o", __file__], "writing would erase it; name another output"),
        (["score", __file__, __file__], "writing would erase it; name another output"),
        (["score", __file__, "-", "--logprobs", __file__], "writing would erase it; name another output"),
        (["convert", "./not-here", "x"], "no such directory"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:1", "--block-size", "8"], "--block-size"),
        (["bench", "throughput", "--num-prompts", "0"], "--num-prompts"),
        (["fly"], "fly"),
    ],
)
def test_what_the_user_can_cure_is_one_line_and_code_2(argv, message, capsys) -> None:
    assert cli.call(argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("jaxserve: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown key 'prot'; did you mean 'port'?"),
        ("[server]\nmax_num_seqs = 1", "unknown key '[server] max_num_seqs'"),
        ("[serve]\nport = 1", "unknown key 'serve'; did you mean 'server'?"),
        ("port = 1\n[server]\nport = 2", "'[server] port' is given twice"),
        ("port = {a = 1}", "'port' must be a value"),
        ("port = = 1", "is not TOML"),
        ("port = 'x'", "port"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(text, message, tmp_path, capsys) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    assert cli.call(["serve", "--config", str(file)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "wrong.toml" in shown


def test_unknown_variable_is_a_warning(served, monkeypatch, capsys) -> None:
    monkeypatch.setenv("JAXSERVE_MAX_NUM_SEQ", "5")
    monkeypatch.setenv("JAXSERVE_DATA", "x")
    served()
    assert capsys.readouterr().err == (
        "jaxserve: warning: unknown environment variable JAXSERVE_MAX_NUM_SEQ; did you mean 'JAXSERVE_MAX_NUM_SEQS'?\n"
    )


def test_failure_at_run_time_is_code_1_and_debug_gives_a_traceback(monkeypatch, capsys) -> None:
    async def dies(*_: object) -> None:
        raise EngineStopped("the engine is gone")

    monkeypatch.setattr(serve, "_serve", dies)
    assert cli.call(["serve"]) == 1
    assert capsys.readouterr().err == "jaxserve: the engine is gone\n"
    monkeypatch.setenv("JAXSERVE_DEBUG", "1")
    with pytest.raises(EngineStopped):
        cli.call(["serve"])


def test_version_is_that_of_the_package(capsys) -> None:
    for argv in (["version"], ["--version"]):
        assert cli.call(argv) == 0
        assert __version__ in capsys.readouterr().out


def test_top_level_loads_no_jax_and_runs_as_a_module() -> None:
    program = "import sys; from jaxserve import cli; cli.make_app(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    done = subprocess.run([sys.executable, "-m", "jaxserve", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


# --- serve ----------------------------------------------------------------------------------------------------------


def test_ready_text_has_all_that_is_needed_to_begin() -> None:
    shown = serve.ready_text(FakeEngine().info, "tiny", True, "http://127.0.0.1:8000", "127.0.0.1:8001")
    for part in ("tiny is ready", "http://127.0.0.1:8000", "127.0.0.1:8001", "curl", "512 tokens"):
        assert part in shown
    assert "/v1/completions" in serve.curl("http://h:1", "m", chat=False)


def test_curl_quotes_a_name_with_a_quote() -> None:
    import shlex

    words = shlex.split(serve.curl("http://h:1", "it's", chat=True))
    assert json.loads(words[-1])["model"] == "it's"


# --- run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "flags", "meant"),
    [
        ([], (None, None), (None, None)),
        (["What is it?"], (None, None), (None, "What is it?")),
        (["org/name"], (None, None), ("org/name", None)),
        (["org/name", "Hi"], (None, None), ("org/name", "Hi")),
        (["org/name"], ("Hi", None), ("org/name", "Hi")),
        ([], ("Hi", None), (None, "Hi")),
        ([], (None, "org/name"), ("org/name", None)),
        (["Hi"], (None, "org/name"), ("org/name", "Hi")),
        (["What is it?"], (None, "org/name"), ("org/name", "What is it?")),
        (["org/other", "Hi"], (None, "org/name"), ("org/other", "Hi")),
        (["org/other"], ("Hi", "org/name"), ("org/other", "Hi")),
    ],
)
def test_what_the_words_of_run_are(words, flags, meant) -> None:
    assert run.which(words, *flags) == meant


@pytest.mark.parametrize("words", [["What", "is", "it?"], ["org/name", "Hi", "there"]])
def test_a_prompt_of_several_words_wants_quotes(words) -> None:
    with pytest.raises(ConfigError, match="quotes"):
        run.which(words, None, None)


@pytest.mark.parametrize("model", [None, "org/name"])
def test_a_directory_with_spaces_is_a_model(model, tmp_path) -> None:
    path = tmp_path / "my model"
    path.mkdir()
    assert run.which([str(path)], None, model) == (str(path), None)


def talk_to(model: TextModel, lines: list[str], monkeypatch: pytest.MonkeyPatch, **params: object) -> run.Talk:
    """A conversation in which the user types `lines`."""
    source = iter(lines)

    def typed(prompt: str) -> str:
        line = next(source, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    talk = run.Talk(model, msgspec.structs.replace(SamplingParams(), **params))
    with asyncio.Runner() as loop:
        run.converse(talk, loop, verbose=True)
    return talk


def test_a_conversation(tmp_path, monkeypatch, capsys) -> None:
    engine = FakeEngine(script=says("Paris."))
    lines = [
        "/set system Be brief.",
        "Where?",
        '"""two',
        "lines",
        '"""',
        "/show",
        "/set parameter temperature 0",
        "/bye",
    ]
    talk = talk_to(model_of(tmp_path, engine), [*lines, "not read"], monkeypatch, max_tokens=20)
    shown = capsys.readouterr()
    assert shown.out.count("Paris.") == 4  # two answers, and both again in /show
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[3]["content"] == "two\nlines"
    assert engine.requests[1].prompt_token_ids[: len(ids_of("x"))] != ()
    assert talk.params.temperature == 0
    for label in (
        "total duration:",
        "load duration:",
        "prompt eval count:",
        "prompt eval rate:",
        "eval count:",
        "eval rate:",
    ):
        assert label in shown.err


def test_clear_forgets(tmp_path, monkeypatch, capsys) -> None:
    talk = talk_to(model_of(tmp_path, FakeEngine(script=says("ok"))), ["hi", "/clear"], monkeypatch, max_tokens=4)
    assert talk.messages == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set parameter top_p 7", "top_p must be in (0, 1]"),
        ("/set parameter top_k few", "top_k is wrong: Expected `int`"),
        ("/set parameter topp 1", "no parameter 'topp'"),
        ("/set parameter logprobs 3", "no parameter 'logprobs'"),
        ("/fly", "Unknown command '/fly'"),
        ("/set top_k 5", "/set parameter NAME VALUE"),
        ("x" * 600, "/clear forgets"),
    ],
)
def test_what_goes_wrong_is_said_and_the_conversation_goes_on(line, message, tmp_path, monkeypatch, capsys) -> None:
    talk = talk_to(model_of(tmp_path, FakeEngine(script=says("ok"))), [line, "hi"], monkeypatch, max_tokens=4)
    shown = capsys.readouterr()
    assert message in shown.err + shown.out
    assert [m["content"] for m in talk.messages] == ["hi", "ok"]


def test_parameters_by_ollamas_names_and_none(tmp_path) -> None:
    talk = run.Talk(model_of(tmp_path), SamplingParams())
    talk.set("num_predict", "5")
    talk.set("repeat_penalty", "1.5")
    talk.set("seed", "7")
    talk.set("stop", "\n\n")
    assert talk.params == SamplingParams(max_tokens=5, repetition_penalty=1.5, seed=7, stop=("\n\n",))
    talk.set("seed", "none")
    talk.set("logit_bias", '{"5": -100}')
    assert talk.params.seed is None
    assert talk.params.logit_bias == {5: -100.0}


def test_ctrl_c_stops_the_answer_and_keeps_what_came(tmp_path, monkeypatch, capsys) -> None:
    engine = FakeEngine(script=says("abcdef"))
    engine.fail_after = (3, KeyboardInterrupt())
    talk = talk_to(model_of(tmp_path, engine), ["hi", "/bye"], monkeypatch, max_tokens=20)
    assert talk.messages[-1] == {"role": "assistant", "content": "abc"}
    assert "(stopped)" in capsys.readouterr().err


def test_model_without_template_continues_the_prompt(tmp_path, capsys) -> None:
    model = model_of(tmp_path, template=False)
    talk = run.Talk(model, SamplingParams(max_tokens=3))
    assert asyncio.run(talk.say("abc")) == "def"
    talk.system = "Be brief."
    with pytest.raises(UnsupportedParameter, match="no chat template"):
        asyncio.run(talk.say("abc"))


# --- generate -------------------------------------------------------------------------------------------------------


def answers(model: TextModel, lines: bytes, *, jsonl: bool, raw: bool = True, **params: object) -> list[dict]:
    import io

    out = io.BytesIO()
    records = generate.read_records(io.BytesIO(lines), jsonl)
    sampling = msgspec.structs.replace(SamplingParams(max_tokens=2), **params)
    failed = asyncio.run(generate.answer_all(model, sampling, records, out, raw=raw))
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert failed == sum("error" in a for a in found)
    return found


def test_lines_of_text_are_answered_in_order(tmp_path) -> None:
    found = answers(model_of(tmp_path), b"ab\n\n  \ncd\r\nxy", jsonl=False)
    assert [(a["line"], a["prompt"], a["choices"][0]["text"]) for a in found] == [
        (1, "ab", "cd"),
        (4, "cd", "ef"),
        (5, "xy", "z{"),
    ]
    assert found[0]["choices"][0]["finish_reason"] == "length"
    assert found[0]["prompt_tokens"] == 2


def test_prompts_are_messages_unless_raw(tmp_path) -> None:
    engine = FakeEngine()
    answers(model_of(tmp_path, engine), b"ab", jsonl=False, raw=False)
    assert len(engine.requests[0].prompt_token_ids) > 10


def test_records_with_ids_messages_and_parameters_of_their_own(tmp_path) -> None:
    lines = b'{"id": "a", "prompt": "ab", "max_tokens": 3, "n": 2}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    first, second = answers(model_of(tmp_path), lines, jsonl=True)
    assert first["id"] == "a"
    assert [c["text"] for c in first["choices"]] == ["cde", "def"]
    assert second["choices"][0]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not a JSON object"),
        (b"[1]", "line 2 is not a JSON object"),
        (b"\xff", "line 2"),
        (b"{}", 'line 2 needs either "prompt" or "messages"'),
        (b'{"prompt": 1}', '"prompt" must be a string'),
        (b'{"messages": ["x"]}', '"messages" must be a list of objects'),
        (b'{"prompt": "a", "max_token": 4}', "unknown key 'max_token'"),
        (b'{"prompt": "a", "max_tokens": "4"}', "line 2"),
        (b'{"prompt": "a", "top_p": 4}', "top_p"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": "a", "max_tokens": 4000}', "maximum context length"),
    ],
)
def test_a_bad_line_gives_an_error_and_the_others_their_answers(line, message, tmp_path) -> None:
    found = answers(model_of(tmp_path), b'{"prompt": "ab"}\n' + line + b'\n{"prompt": "cd"}\n', jsonl=True)
    assert [a["line"] for a in found] == [1, 2, 3]
    assert message in found[1]["error"]["message"]
    assert found[0]["choices"][0]["text"] == "cd"
    assert found[2]["choices"][0]["text"] == "ef"


def test_a_long_file_is_not_read_far_ahead(tmp_path) -> None:
    engine = FakeEngine(max_num_seqs=2)
    model = model_of(tmp_path, engine)
    read = 0

    def records() -> Iterator[generate.Record]:
        nonlocal read
        for line in range(1, 101):
            read = line
            assert line - len(engine.finished) <= 2 * generate.AHEAD
            yield generate.Record(line, prompt="ab")

    with open(os.devnull, "wb") as out:
        assert asyncio.run(generate.answer_all(model, SamplingParams(max_tokens=3), records(), out, raw=True)) == 0
    assert read == 100


def test_generate_opens_its_files_before_the_model(tmp_path, monkeypatch, capsys) -> None:
    model = model_of(tmp_path)

    @contextlib.asynccontextmanager
    async def opened(engine: EngineOptions, name: str):
        yield model

    monkeypatch.setattr(generate, "opened", opened)
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("ab\ncd\n")
    assert cli.call(["generate", str(source), "-o", str(target), "--raw", "--max-tokens", "1"]) == 0
    assert [json.loads(line)["choices"][0]["text"] for line in target.read_text().splitlines()] == ["c", "e"]
    with source.open() as piped:
        monkeypatch.setattr("sys.stdin", piped)
        assert cli.call(["generate", "-", "-o", "-", "--raw", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out == target.read_text()
    source.write_text("ab\n\xff" + "x" * 1000)
    assert cli.call(["generate", str(source), "--raw"]) == 1
    assert "1 records failed" in capsys.readouterr().err


# --- options --------------------------------------------------------------------------------------------------------


def test_sampling_flags_lie_over_the_models_defaults() -> None:
    defaults = SamplingParams(temperature=0.7, top_k=5, max_tokens=None)
    assert options.SamplingFlags().params(defaults) == defaults
    flags = options.SamplingFlags(temperature=0.0, stop=("x",), ignore_eos=True)
    assert flags.params(defaults) == SamplingParams(
        temperature=0.0, top_k=5, max_tokens=None, stop=("x",), ignore_eos=True
    )
    with pytest.raises(ConfigError, match="top_p"):
        options.SamplingFlags(top_p=2.0)
