"""What of jobs and replicas on Ray needs no Ray: where engines go, what a worker says, and what is refused."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from jaxserve import cli
from jaxserve.batch_job.files import Source
from jaxserve.batch_job.rows import COMPLETIONS, Row, count_rows, read_rows
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, RayOptions, ScheduleOptions, parse_resources
from jaxserve.errors import BatchStopped, ConfigError, InvalidParameter
from jaxserve.ray.placement import place, remote_args

worker = pytest.importorskip("jaxserve.ray.worker", reason="workers need pyarrow, which is in the extra `offline`")

ROOT = Path(__file__).parent.parent
CPUS, GPUS, TPU = {"CPU": 16.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 96.0, "TPU": 8.0}
ROWS = [
    Row(number=0, line=1, place="line 1", url="/v1/completions", body=b'{"prompt": "The sky", "max_tokens": 4}'),
    Row(number=1, line=2, place="line 2", error=InvalidParameter("not JSON", param="body")),
    Row(number=2, line=3, place="line 3", url="/v1/completions", body=b'{"prompt": "The sea", "max_tokens": 3}'),
]


@pytest.mark.parametrize(
    ("nodes", "options", "mesh", "workers", "resources"),
    [
        ([CPUS, CPUS], {}, None, 2, {"CPU": 16}),  # one a host
        ([CPUS, CPUS], {"workers": 5}, None, 5, {"CPU": 5}),
        ([CPUS, {"CPU": 4.0}, {"GPU": 0.0}], {}, None, 5, {"CPU": 4}),
        ([GPUS, GPUS, CPUS], {}, None, 8, {"CPU": 1, "GPU": 1}),
        ([GPUS, GPUS], {"workers": 3}, "2x1", 3, {"CPU": 1, "GPU": 2}),
        ([TPU, TPU], {}, "2x4", 2, {"CPU": 1, "TPU": 8}),
        ([TPU, GPUS], {"worker_resources": "GPU=2,CPU=4"}, "2", 2, {"GPU": 2, "CPU": 4}),
    ],
)
def test_an_engine_for_each_accelerator_or_host(nodes, options, mesh, workers, resources) -> None:
    engine = EngineOptions(device=DeviceOptions(mesh=mesh))
    found = place(nodes, RayOptions(**options), engine)
    assert (found.workers, dict(found.resources)) == (workers, resources)
    assert found.on_cpu == (found.threads is not None) == (resources.keys() == {"CPU"})


def test_engines_of_a_host_share_its_memory_and_nothing_else() -> None:
    engine = EngineOptions()
    assert place([CPUS, CPUS], RayOptions(workers=4), engine).options(engine).device.memory_utilization == 0.25
    assert place([GPUS], RayOptions(), engine).options(engine) == engine
    given = replace(engine, device=DeviceOptions(memory_utilization=0.9))
    assert place([CPUS], RayOptions(workers=4), given).options(given) == given


@pytest.mark.parametrize(
    ("nodes", "options", "mesh", "message"),
    [
        ([GPUS], {"workers": 5}, None, "room for 4 engines of CPU=1, GPU=1, not for 5"),
        ([GPUS], {}, "8", "no node of the Ray cluster has CPU=1, GPU=8"),
        ([GPUS, TPU], {}, None, "has GPUs and TPUs: say with worker_resources which"),
        ([{"CPU": 0.5}], {}, None, "no node of the Ray cluster has a CPU to spare"),
    ],
)
def test_what_does_not_fit_is_said(nodes, options, mesh, message) -> None:
    with pytest.raises(ConfigError, match=message):
        place(nodes, RayOptions(**options), EngineOptions(device=DeviceOptions(mesh=mesh)))


@pytest.mark.parametrize("text", ["", "GPU", "GPU=", "GPU=x", "=1", "GPU=1,GPU=2", "GPU=-1", "GPU=nan"])
def test_resources_that_are_none_are_refused(text) -> None:
    with pytest.raises(ConfigError, match="give NAME=AMOUNT"):
        parse_resources(text)


def test_resources_as_ray_wants_them() -> None:
    asked = remote_args(parse_resources("GPU=1, CPU=2,TPU=4"))
    assert asked == {"num_cpus": 2.0, "num_gpus": 1.0, "resources": {"TPU": 4.0}}
    assert remote_args({"TPU": 8.0}) == {"num_cpus": 0, "resources": {"TPU": 8.0}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--engine", "ray", "--workers", "0"], "workers must be at least 1"),
        (["--engine", "ray", "--ray-address", "ray://head:10001"], "Run it there, with `ray job submit`"),
        (["--engine", "ray", "--worker-resources", "GPU"], "give NAME=AMOUNT"),
        (["--engine", "horse"], "horse"),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(flags, message, tmp_path, capsys) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    assert cli.call(["batch", str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_cure_is_said(tmp_path, capsys) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    assert cli.call(["batch", str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), "--engine", "ray"]) == 2
    assert "pip install 'jaxserve[ray]'" in capsys.readouterr().err


def test_the_command_line_does_not_load_ray() -> None:
    program = "import sys, jaxserve.ray, jaxserve.cli.batch; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def assignment(**model) -> "worker.Assignment":
    engine = EngineOptions(
        model=ModelOptions(**model),
        schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=64, max_queued_requests=1),
        device=DeviceOptions(warmup="lazy"),
    )
    return worker.Assignment(
        engine=engine,
        name="tiny",
        digest="d",
        seed=0,
        given={},
        settings={"raw": True},
        now=datetime.now(),
        threads=None,
    )


def test_a_worker_answers_what_it_is_given_and_says_what_it_is() -> None:
    one = worker.Worker(assignment())
    (cell,) = one(worker.packed(ROWS)).column("answered")
    said = worker.unpacked(cell)
    assert said.error is None
    assert sorted(result.number for result in said.results) == [0, 1, 2]
    by_number = {result.number: result for result in said.results}
    assert (by_number[0].failure, by_number[0].tokens) == (None, 4)
    assert by_number[1].failure == "line 2: not JSON"
    assert said.head["input"] == "d"
    assert said.head["engine's platform"] == "cpu"
    # More at once than the engine's queue holds.
    many = [Row(number=i, line=i, place="", url=ROWS[0].url, body=ROWS[0].body) for i in range(12)]
    said = worker.unpacked(one(worker.packed(many)).column("answered")[0])
    assert [result.failure for result in said.results] == [None] * 12
    # Its engine ends.
    one._call(one._answers._model.client.stop())
    said = worker.unpacked(one(worker.packed(ROWS)).column("answered")[0])
    assert isinstance(said.error.rebuild(), BatchStopped)
    assert "run the same again" in said.error.message


def test_a_worker_whose_model_is_none_says_so_each_time() -> None:
    one = worker.Worker(assignment(model="no/such directory"))
    for _ in range(2):
        said = worker.unpacked(one(worker.packed(ROWS)).column("answered")[0])
        assert isinstance(said.error.rebuild(), ConfigError)


def test_rows_cross_with_their_errors() -> None:
    (row,) = worker.unpacked(worker.packed([ROWS[1]]).column("rows")[0])
    assert (type(row.error), row.error.message, row.error.param) == (InvalidParameter, "not JSON", "body")


def test_rows_are_counted_as_they_are_read(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\n  \ntwo\r\n\xff\nlast")
    sources = [Source(str(tmp_path / "a.txt"), "a.txt")]
    assert count_rows(sources) == len(list(read_rows(sources, bare=COMPLETIONS))) == 4
