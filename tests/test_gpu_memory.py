"""The share of a GPU's memory that JAX is told to set aside: by jaxlib's own reading, and in each process we start."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from jaxlib import xla_client

from jaxserve import cli
from jaxserve.client.remote import RemoteEngine
from jaxserve.client.supervise import follow
from jaxserve.config import EngineOptions, HostPlace
from jaxserve.errors import EngineStopped
from jaxserve.gpu_memory import POOL, pool_variables
from jaxserve.planning.chips import CHIPS
from jaxserve.ray.placement import confine

NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture
def environ(monkeypatch):
    """The process's, without a share; what a test sets is taken back."""
    for name in (NEW, OLD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "share"), [({}, POOL), ({NEW: ""}, POOL), ({NEW: "0.45"}, 0.45), ({OLD: "0.3"}, 0.3)]
)
def test_jax_takes_what_the_user_says_or_else_ours(environ, given, share):
    for name, value in given.items():
        environ.setenv(name, value)
    for name, value in pool_variables().items():
        environ.setenv(name, value)
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == share


async def remote(options):
    engine = RemoteEngine(options, Path("nowhere"))
    await engine.start()
    with pytest.raises(EngineStopped, match="could not be run: enough"):
        await engine.wait_ready()


async def following(options):
    with pytest.raises(OSError, match="enough"):
        await follow(options, Path("nowhere"), 1.0)


@pytest.mark.parametrize("start", [remote, following])
@pytest.mark.parametrize("given", [{}, {NEW: "0.45"}, {OLD: "0.3"}])
def test_every_engine_process_is_told(environ, start, given):
    seen = []

    def instead(*command, env, **rest):
        seen.append(env)
        raise OSError("enough")

    environ.setattr(subprocess, "Popen", instead)
    environ.setattr(asyncio, "create_subprocess_exec", instead)
    for name, value in given.items():
        environ.setenv(name, value)
    place = HostPlace(index=1, count=2, coordinator="h", port=1, secret="s")
    asyncio.run(start(EngineOptions(place=place)))
    (env,) = seen
    assert {name: env[name] for name in (NEW, OLD) if name in env} == (given or {NEW: str(POOL)})
    assert env["PATH"] == os.environ["PATH"] and NEW not in os.environ.keys() - given.keys()


@pytest.mark.parametrize("given", [{}, {OLD: "0.3"}])
def test_a_command_and_a_worker_on_ray_tell_their_own_process(environ, given):
    for name, value in given.items():
        environ.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main(["version"])
    assert os.environ.get(NEW) == (None if given else str(POOL))
    environ.delenv(NEW, raising=False)
    confine(None)
    assert os.environ.get(NEW) == (None if given else str(POOL))


def test_a_plan_has_the_same_share():
    assert CHIPS["h100"].memory == int(80 * 2**30 * POOL)
