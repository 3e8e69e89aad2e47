"""Jobs and replicas on a Ray of two workers, one of which is killed; RAY_ADDRESS names a Ray that is there already."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve import cli
from jaxserve.batch_job.store import Store
from jaxserve.errors import ConfigError

ray = pytest.importorskip("ray", reason="Ray is in the extra `ray`; `make test-ray` has it")
httpx = pytest.importorskip("httpx")
from jaxserve.ray import app  # noqa: E402
from jaxserve.ray.batch import RayJob  # noqa: E402

ROOT = Path(__file__).parent.parent
SMALL = ["--warmup", "lazy", "--max-num-batched-tokens", "64", "--max-num-seqs", "4"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own there are dozens


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["PYTHONPATH"] = str(ROOT)  # what Ray's workers find jaxserve by
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address)
    else:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**28)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows, sampled; one is not JSON, and one has the custom_id of another."""
    path = tmp_path_factory.mktemp("job") / "in.jsonl"
    with path.open("w") as file:
        for i in range(60):
            body = {"prompt": f"Question {i}: what", "max_tokens": 16, "temperature": 1.0, "n": 1 + i % 2}
            row = {"custom_id": f"r{i % 59}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(("{" if i == 7 else json.dumps(row)) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> bytes:
    """What one engine, with batches of another size, makes of the rows."""
    out = source.with_name("whole.jsonl")
    argv = ["batch", str(source), str(out), *SMALL[:-1], "8"]
    done = subprocess.run([sys.executable, "-m", "jaxserve", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    return out.read_bytes()


class Gone(BaseException):
    """This process is dead: nothing is finished or said."""


def processes(title: str) -> list[int]:
    """The processes that Ray has named so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            pass
    return found


def test_the_driver_dies_and_then_a_worker(source, whole, tmp_path, monkeypatch, capfd) -> None:
    out = tmp_path / "out.jsonl"
    argv = ["batch", str(source), str(out), *SMALL, "--engine", "ray", "--workers", "2"]
    take = RayJob._take

    def last_words(job: RayJob, answered) -> None:
        take(job, answered)
        raise Gone

    monkeypatch.setattr(RayJob, "_take", last_words)
    with pytest.raises(Gone):
        cli.call(argv)
    killed_at = []

    def murder(job: RayJob, answered) -> None:
        take(job, answered)
        workers = processes("ray::MapWorker")
        if not killed_at and len(workers) == 2:
            os.kill(workers[0], signal.SIGKILL)
            killed_at.append(job._work.store.finished)

    monkeypatch.setattr(RayJob, "_take", murder)
    assert cli.call(argv) == 3
    assert 0 < killed_at[0] < 50
    assert out.read_bytes() == whole
    assert "going on after" in capfd.readouterr().err


def test_where_nothing_is_left_no_worker_is_started(source, whole, tmp_path, monkeypatch) -> None:
    (tmp_path / "none.txt").write_text("\n")
    out = tmp_path / "none.jsonl"
    argv = ["--engine", "ray", "--workers", "2"]
    monkeypatch.setattr(RayJob, "_dataset", None)
    assert cli.call(["batch", str(tmp_path / "none.txt"), str(out), *argv]) == 0
    assert out.read_bytes() == b""
    # As if the process had died when all rows were there, and it had not yet said so.
    with contextlib.closing(Store(source.with_name("whole.jsonl"))) as done:
        done.resume()
        head, failed, tokens = done.head, done.failed, done.tokens
    with contextlib.closing(Store(tmp_path / "again.jsonl")) as again:
        again.begin(head)
        for number, line in enumerate(whole.splitlines()):
            again.add(number, line, failed=number < failed, tokens=tokens if number == 0 else 0)
    assert cli.call(["batch", str(source), str(tmp_path / "again.jsonl"), *SMALL, *argv]) == 3
    assert (tmp_path / "again.jsonl").read_bytes() == whole


def test_what_a_worker_cannot_load_is_said_in_one_line(source, tmp_path, capsys) -> None:
    argv = ["batch", str(source), str(tmp_path / "out.jsonl"), *SMALL, "--engine", "ray", "--workers", "1"]
    assert cli.call([*argv, "--attention", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err.splitlines()[-1]
    assert cli.call([*argv[:-1], "7"]) == 2
    assert "room for 2 engines of CPU=1, not for 7" in capsys.readouterr().err


def test_two_replicas_one_of_which_is_killed() -> None:
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    url = f"http://127.0.0.1:{port}"
    options = {"max_num_seqs": "4", "max_num_batched_tokens": "64", "warmup": "lazy", "min_replicas": 2}
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    try:
        serve.run(app(options | {"max_replicas": 2}))
        with httpx.Client(timeout=120) as client:
            answer = client.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert "Paris" in answer
            with client.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}) as response:
                events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
            assert len(events) > 3
            assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]) == answer
            assert client.get(f"{url}/health").json() == {"status": "ok"}
            assert client.post(f"{url}/v1/completions", json={"prompt": ""}).status_code == 400
            replicas = processes("ray::ServeReplica")
            assert len(replicas) == 2

        def ask(i: int) -> str:
            """An answer; asked for again if the replica dies over it."""
            for _ in range(20):
                with httpx.Client(timeout=120) as client:
                    try:
                        reply = client.post(f"{url}/v1/chat/completions", json=body)
                    except httpx.TransportError:
                        continue
                if reply.status_code == 200:
                    return reply.json()["choices"][0]["message"]["content"]
                time.sleep(0.2)
            raise AssertionError(reply.text)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, i) for i in range(24)]
            concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
            os.kill(replicas[0], signal.SIGKILL)
            assert {future.result() for future in asked} == {answer}
        for _ in range(600):
            if len(now := processes("ray::ServeReplica")) == 2 and replicas[0] not in now:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the dead replica was not replaced")
    finally:
        serve.shutdown()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prot": 1}, "there is no option 'prot'"),
        ({"admin_key": "x"}, "there is no option 'admin_key'"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"min_replicas": "3"}, "give 0 <= min <= max"),
        ({"target_ongoing_requests": "0"}, "must be above 0"),
        ({"resources": "GPU"}, "give NAME=AMOUNT"),
    ],
)
def test_wrong_arguments_of_an_application_are_refused(args, message) -> None:
    with pytest.raises(ConfigError, match=message):
        app(args)


def test_what_serve_is_asked_for() -> None:
    asked = app({"max_num_seqs": "8", "mesh": "2x4", "resources": "TPU=8,CPU=2", "max_replicas": "3"})
    deployment = asked._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 16)
    assert deployment.max_ongoing_requests == 32
    actor = deployment.ray_actor_options
    assert (actor["num_cpus"], actor["resources"]) == (2, {"TPU": 8})
