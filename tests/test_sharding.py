"""Meshes: what a shape means and what is refused; on eight devices, that a divided model is the same model."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import msgspec
import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from running_engine import request

from jaxserve.client.routing import AFFINITY, Router
from jaxserve.config import DeviceOptions, MeshShape
from jaxserve.errors import ConfigError
from jaxserve.metrics import EngineMetrics, JoinedMetrics
from jaxserve.pages import PagePool, PageTables, block_hashes
from jaxserve.request import EngineInfo
from jaxserve.sharding import meshes, place_heads

HERE = Path(__file__).parent


@pytest.mark.timeout(900)  # half a hundred engines
def test_on_eight_devices(pytestconfig):
    """What eight_devices.py has, in a process that has them; slow tests where this one runs beside such."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "eight_devices.py")]
    command += ["-m", pytestconfig.option.markexpr]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("4", MeshShape(model=4)),
        ("2x4", MeshShape(data=2, model=4)),
        ("data=2,model=4", MeshShape(data=2, model=4)),
        ("model=2, expert=4", MeshShape(expert=4, model=2)),
    ],
)
def test_a_shape_is_read_and_said(text, shape):
    assert MeshShape.parse(text) == shape == MeshShape.parse(str(shape))


@pytest.mark.parametrize("text", ["", "x", "2x", "0x4", "-1", "2x2x2", "2*4", "model=", "model=2,model=2"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ConfigError, match="give MODEL"):
        DeviceOptions(mesh=text)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ConfigError, match="unknown axis 'tensor'; axes are data, expert, model"):
        DeviceOptions(mesh="tensor=4")


@pytest.mark.parametrize(
    ("text", "found", "cure"), [("2x4", 4, "try --mesh 1x4"), ("1x8", 4, "try --mesh 1x4"), ("4x2", 5, "--mesh 2x2")]
)
def test_too_few_devices_are_refused_with_what_could_be_had(text, found, cure):
    with pytest.raises(ConfigError, match=f"mesh {text} needs 8 devices, found {found}; .*{cure}"):
        meshes(MeshShape.parse(text), jax.local_devices() * found)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (7, 1), (6, 2), (32, 8), (12, 3)])
def test_every_query_head_has_one_place_and_lies_with_its_kv_head(heads, kv_heads, shards):
    placed = place_heads(heads, kv_heads, shards)
    assert len(placed.kv) % shards == 0 and len(placed.query) % len(placed.kv) == 0
    assert sorted(h for h in placed.query if h >= 0) == list(range(heads))
    group = len(placed.query) // len(placed.kv)
    for place, head in enumerate(placed.query):
        assert head < 0 or placed.kv[place // group] == head // (heads // kv_heads)
    assert len(placed.kv) // shards == -(-kv_heads // shards), "no more KV cache a device than there must be"


def test_what_divides_evenly_is_left_as_it_is():
    assert place_heads(8, 4, 2) == place_heads(8, 4, 4) == place_heads(8, 4, 1)
    assert place_heads(8, 2, 4).query == tuple(range(8)), "each kv head twice, half of its query heads each"
    assert place_heads(8, 2, 4).kv == (0, 0, 1, 1)


def info(**changes) -> EngineInfo:
    return msgspec.structs.replace(FakeEngine().info, **{"max_num_seqs": 4, "page_size": 4, "num_pages": 64, **changes})


def router(count=2, **changes):
    pools = [PagePool(64, 4) for _ in range(count)]
    return Router([info(**changes)] * count, [PageTables(pool) for pool in pools], prefix_caching=True), pools


def holds(pool, prompt):
    """Has the pool keep the pages of a prompt's full blocks, as if a request had left them."""
    hashes = block_hashes(prompt, pool.page_size, "")
    pages = pool.take(len(hashes))
    for page, h in zip(pages, hashes, strict=True):
        pool.register(page, h)
    pool.release(pages)


def test_requests_are_spread_and_room_that_comes_free_counts():
    routes, _ = router()
    assert [routes.admit(request(str(i), [i] * 5)) for i in range(4)] == [0, 1, 0, 1]
    routes.finished("1")
    assert routes.admit(request("4", [9] * 5)) == 1
    assert routes.withdraw("0") == 0 and routes.withdraw("0") is None
    assert routes.admit(request("5", [9] * 5)) == 0
    routes.finished("0")  # of one that was aborted: too late to count
    assert [routes.admit(request(str(i), [i] * 5)) for i in (6, 7)] == [0, 1]


def test_long_requests_and_many_continuations_are_more_load():
    routes, _ = router(num_pages=16)
    assert routes.admit(request("long", [1] * 5, max_tokens=55)) == 0  # 60 of 64 tokens
    assert [routes.admit(request(str(i), [2], max_tokens=1)) for i in range(3)] == [1, 1, 1]
    routes, _ = router()
    assert routes.admit(request("many", [1], max_tokens=1, n=3)) == 0
    assert [routes.admit(request(str(i), [2], max_tokens=1)) for i in range(3)] == [1, 1, 1]
    for _ in range(3):
        routes.finished("many")
    assert routes.admit(request("next", [2], max_tokens=1)) == 0


def test_a_known_prefix_is_followed_unless_its_replica_has_much_more_to_do():
    routes, pools = router(max_num_seqs=8)
    prompt = list(range(10, 23))
    holds(pools[1], prompt[:8])
    assert [routes.admit(request(str(i), prompt, max_tokens=1)) for i in range(3)] == [1, 1, 1]
    assert AFFINITY == 2 / 8, "two sequences more than the other are borne, three are not"
    assert routes.admit(request("3", prompt, max_tokens=1)) == 0
    holds(pools[0], prompt[:4])
    routes.withdraw("2")
    assert routes.admit(request("4", prompt, max_tokens=1)) == 1, "the longer of two known beginnings"


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"cache_salt": "somebody else's"}])
def test_pages_that_a_request_may_not_use_do_not_draw_it(asked):
    routes, pools = router()
    prompt = list(range(10, 23))
    holds(pools[1], prompt)
    assert routes.admit(request("a", prompt, **asked)) == 0
    assert routes.admit(request("b", prompt[:4])) == 1, "least loaded: of one page its last token is computed anyhow"


def test_metrics_of_replicas_are_one_text():
    parts = [EngineMetrics("tiny", engine=str(i)) for i in range(2)]
    parts[1].steps.inc(3)
    text = JoinedMetrics(parts).text().decode()
    assert text.count("# TYPE jaxserve_steps_total counter") == 1
    values = {
        (s.labels["engine"]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == "jaxserve_steps_total"
    }
    assert values == {"0": 0, "1": 3}
