"""An engine's process that is begun before anyone knows what it is to serve."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve import __main__ as entry
from jaxserve import cli
from jaxserve.cli import serve
from jaxserve.engine_process import EngineProcess


class Begun:
    """In an EngineProcess's place."""

    dismissed = 0

    def dismiss(self):
        self.dismissed += 1


def test_serve_takes_the_process_that_was_begun(monkeypatch):
    taken, begun = [], Begun()

    async def instead(engine, server, name, begun):
        assert not begun.dismissed
        taken.append(begun)

    monkeypatch.setattr(serve, "_serve", instead)
    assert cli.call(["serve"], begun) == 0
    assert taken == [begun]


@pytest.mark.parametrize("in_process", [False, True])
def test_it_is_dismissed_as_soon_as_nobody_wants_it(monkeypatch, in_process):
    seen, begun = [], Begun()

    async def instead(engine, server, name, begun):
        seen.append(begun.dismissed)

    monkeypatch.setattr(serve, "_serve", instead)
    monkeypatch.setenv("JAXSERVE_IN_PROCESS", str(in_process).lower())
    assert cli.call(["serve"], begun) == 0
    assert seen == [int(in_process)]


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["serve"], True),
        (["serve", "model.gguf", "--port", "0"], True),
        (["serve", "--help"], False),
        (["serve", "--in-process"], False),
        (["show", "serve"], False),
        ([], False),
    ],
)
def test_only_who_serves_begins_one(monkeypatch, words, begins):
    given = []
    monkeypatch.setattr(entry, "EngineProcess", Begun)
    monkeypatch.setattr(cli, "main", lambda words, begun: given.append((words, begun)))
    monkeypatch.setattr(sys, "argv", ["jaxserve", *words])
    entry.main()
    ((told, begun),) = given
    assert told == words and isinstance(begun, Begun) == begins


def test_a_wrong_command_line_leaves_no_process(monkeypatch, capsys):
    begun = EngineProcess()
    pid = begun.pid
    assert Path(f"/proc/{pid}").exists()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--no-such-flag"], begun)
    assert "--no-such-flag" in capsys.readouterr().err
    assert begun.pid is None and not Path(f"/proc/{pid}").exists()
    begun.dismiss()  # once more does no harm


def test_it_ends_quietly_when_it_is_told_nothing(tmp_path):
    """As when its front end was killed."""
    command = [sys.executable, "-m", "jaxserve.client.host"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_to_tell_one_that_has_ended_is_no_error():
    begun = EngineProcess()
    begun.kill()
    begun.wait()
    begun.tell(b"x" * 2**20)
    begun.dismiss()
    assert begun.pid is None
