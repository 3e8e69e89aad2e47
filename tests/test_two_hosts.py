"""`jaxserve serve` on two hosts, which are two commands on this machine with four CPU devices each.

One pair of commands serves all tests but the last two, since to start one takes most of the time.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
from running_server import Server
from safetensors.numpy import load_file, save_file

from jaxserve.hub import resolve_model
from jaxserve.weights import open_checkpoint

SIZES = (
    "--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--block-size", "4", "--decode-steps", "2",
    "--max-model-len", "64", "--attention", "reference", "--warmup", "lazy",
)  # fmt: skip
TIMEOUT_S = 10
REQUESTS = [
    dict(prompt=[5, 9, 300, 41], max_tokens=6, temperature=0),
    dict(prompt=[7, 9, 300, 41], max_tokens=6, temperature=0.9, top_p=0.95, seed=7),
    # In three pieces, and with what binds its slot first.
    dict(prompt=list(range(20, 58)), max_tokens=6, temperature=1.0, seed=8, repetition_penalty=1.3, logprobs=2),
]


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {"XLA_FLAGS": flags, "JAXSERVE_HOST_SECRET": "of the tests"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The embedded model's first layer: four kv heads for eight devices."""
    source, path = resolve_model(None), tmp_path_factory.mktemp("model")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    weights = open_checkpoint(source)
    first = [name for name in weights.names() if ".layers." not in name or ".layers.0." in name]
    save_file({name: weights.read(name).astype(np.float32) for name in first}, path / "model.safetensors")
    return path


class Command:
    """A host's command, and what it says."""

    def __init__(self, path: Path, port: int, index: int, mesh: str):
        argv = [sys.executable, "-m", "jaxserve", "serve", str(path), "--mesh", mesh, *SIZES]
        argv += ["--hosts", "2", "--host-index", str(index), "--coordinator", f"127.0.0.1:{port}"]
        argv += ["--port", "0", "--grpc-port", "-1", "--host-timeout", str(TIMEOUT_S), "--shutdown-timeout", "5"]
        self.process = subprocess.Popen(
            argv, env=environment(4), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said += line

    def wait_for(self, words: str, seconds: float, after: int = 0) -> re.Match:
        """Until it has said something, after some letters that it said before."""
        end = time.monotonic() + seconds
        while not (found := re.search(words, self.said[after:])):
            assert self.process.poll() is None and time.monotonic() < end, f"{words!r} is not in:\n{self.said}"
            time.sleep(0.02)
        return found

    def engine(self) -> int:
        """Its engine process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(c) for c in children if b"jaxserve.client" in Path(f"/proc/{c}/cmdline").read_bytes()]
        return pid

    def ends(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)  # until its engine process has gone, too
        assert not self._reader.is_alive(), self.said
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def commands(*paths: Path, mesh: str = "1x8"):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    hosts = []
    try:
        for index, path in enumerate(paths):
            hosts.append(Command(path, port, index, mesh))
        yield hosts
    finally:
        for host in hosts:
            if host.process.poll() is None:
                host.process.kill()
            host.ends(10)


@pytest.fixture(scope="module")
def pair(checkpoint):
    with commands(checkpoint, checkpoint) as hosts:
        url = hosts[0].wait_for(r"HTTP     (\S+)", 120)[1]
        with httpx.Client(base_url=url, timeout=60) as client:
            hosts[0].client = client
            yield hosts


def ask(client: httpx.Client, **body) -> dict:
    answer = client.post("/v1/completions", json=body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def tokens(client: httpx.Client) -> list[list[int]]:
    return [ask(client, **body)["token_ids"] for body in REQUESTS]


@pytest.fixture(scope="module")
def answers(checkpoint) -> list[list[int]]:
    """Of one process that has all eight devices."""
    with mock.patch.dict(os.environ, environment(8)), Server("--mesh", "1x8", *SIZES, model=checkpoint) as server:
        return tokens(server.client)


def wait_until_served(host: Command, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while host.client.get("/health").status_code != 200:
        assert time.monotonic() < end and host.process.poll() is None, host.said
        time.sleep(0.05)


def refused(host: Command, words: str, seconds: float) -> str:
    """What health says once it says such words, with 503."""
    end = time.monotonic() + seconds
    while True:
        answer = host.client.get("/health")
        if answer.status_code == 503 and re.search(words, answer.text):
            return answer.text
        assert time.monotonic() < end, (answer.text, host.said)
        time.sleep(0.02)


@pytest.mark.timeout(300)
def test_two_hosts_answer_as_one_process(pair, answers):
    assert tokens(pair[0].client) == answers
    assert "mesh 1x8" in pair[0].said
    assert "this host's part of" in pair[1].said


@pytest.mark.timeout(300)
def test_a_host_that_is_killed_is_named_and_all_start_again(pair, answers):
    leader, follower = pair
    before = leader.engine(), follower.engine()
    os.kill(before[1], signal.SIGKILL)
    refused(leader, r"host 1 \(\S+ 127.0.0.1\) ended", 5)
    assert leader.client.post("/v1/completions", json=REQUESTS[0]).status_code == 503
    follower.wait_for("the engine process of host 1 was ended by SIGKILL; starting it again", 5)
    wait_until_served(leader)
    assert tokens(leader.client) == answers
    assert set(before).isdisjoint([leader.engine(), follower.engine()])


@pytest.mark.timeout(300)
def test_a_host_that_is_stopped_is_named_with_its_step_and_all_start_again(pair, answers):
    leader, follower = pair
    stopped = follower.engine()
    os.kill(stopped, signal.SIGSTOP)
    in_flight = []
    asking = threading.Thread(target=lambda: in_flight.append(leader.client.post("/v1/completions", json=REQUESTS[0])))
    asking.start()
    refused(leader, r"host 1 \(\S+ 127.0.0.1\) has not confirmed step \d+ for", TIMEOUT_S + 5)
    asking.join(10)
    assert in_flight[0].status_code == 503
    said = len(follower.said)
    os.kill(stopped, signal.SIGCONT)  # it finds out by itself, within the collective that it waits in
    follower.wait_for(r"host 0 \S+ (starts again|ended)|host 0 starts again", 10, said)
    wait_until_served(leader)
    assert tokens(leader.client)[0] == answers[0]


@pytest.mark.timeout(300)
def test_a_leader_that_is_killed_is_missed_and_a_follower_ends_when_it_is_told(pair):
    leader, follower = pair
    leader.process.kill()
    follower.wait_for(r"host 0 \(127.0.0.1:\d+\) ended", 10)
    follower.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(AssertionError):  # it has ended: there was no engine process at that moment
        follower.wait_for("waiting for host 0 to stop", 20)
        follower.process.send_signal(signal.SIGTERM)
    assert follower.ends(20) == 0


@pytest.mark.timeout(120)
def test_a_host_with_another_checkpoint_is_refused_and_all_end(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: w * 2 for name, w in weights.items()}, tmp_path / "model.safetensors")
    with commands(checkpoint, tmp_path) as (leader, follower):
        assert (leader.ends(60), follower.ends(10)) == (2, 2), leader.said + follower.said
        words = r"host 1 \(\S+ 127.0.0.1\) is not like host 0: checkpoint is \w+ there, \w+ on host 0\n"
        assert re.search(words, leader.said) and re.search(words, follower.said)


@pytest.mark.timeout(120)
def test_a_mesh_that_is_not_that_of_all_devices_is_refused_and_all_end(checkpoint):
    with commands(checkpoint, checkpoint, mesh="1x4") as (leader, follower):
        assert (leader.ends(60), follower.ends(10)) == (2, 2), leader.said + follower.said
        for host in (leader, follower):
            assert "mesh 1x4 needs 4 devices; 2 hosts have 8, this one 4; try --mesh 1x8" in host.said
