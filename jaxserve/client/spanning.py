"""The devices of several hosts as one mesh, and launches that run on all of them.

Knows how hosts are brought together in JAX; what they say to each other is the business of hosts/.
"""

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.batch import Shape
from jaxserve.config import EngineOptions, HostPlace, MeshShape, authority
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError
from jaxserve.hosts.identity import describe
from jaxserve.hosts.leader import Leader, listen_at
from jaxserve.loading import Progress
from jaxserve.runner import Launch, Runner
from jaxserve.sharding import meshes
from jaxserve.step import StepOutput

CAUSE_S = 2.0
"""A collective may fail before the host is known that made it fail; so long the cause is waited for."""


def free_port(place: HostPlace) -> int:
    """The port after host 0's own if it is free, else any other one that is."""
    host = "127.0.0.1" if listen_at(place, 0).startswith("127") else ""
    for port in (place.port + 1, 0):
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((host, port))
                return int(listener.getsockname()[1])
        except (OSError, OverflowError):
            continue
    raise ConfigError("this machine has no free port for JAX's coordination service")


@contextlib.contextmanager
def leading(
    options: EngineOptions, path: Path, progress: Progress, *, lost: Callable[[JaxserveError], None], again: bool
) -> Iterator[tuple[Mesh, "Leading"]]:
    """On host 0: all devices, once the other hosts have joined, and the hosts. An error of the body ends those, too.

    Raises ConfigError for hosts that are not alike and for a mesh that is not theirs, EngineStopped for a host that is
    lost meanwhile.
    """
    assert options.place is not None
    leader = Leader(options.place, describe(options, path), lost=lost, again=again)
    try:
        leader.gather(progress)
        port = free_port(options.place)
        leader.welcome(port)
        progress(f"{options.place.count} hosts have joined")
        yield spanning_mesh(options, port), Leading(leader)
    except JaxserveError as error:
        leader.stop(error)
        raise
    except Exception as error:
        cause = leader.failure(CAUSE_S) or EngineStopped(f"the engine failed: {type(error).__name__}: {error}")
        leader.stop(cause)
        raise cause from error


def spanning_mesh(options: EngineOptions, port: int) -> Mesh:
    """The mesh of all hosts' devices, each of which calls this; `port` is that of JAX's coordination service.

    Raises ConfigError when the options' mesh is another one.
    """
    place = options.place
    assert place is not None and options.device.mesh is not None
    host = "127.0.0.1" if place.index == 0 else place.coordinator
    jax.distributed.initialize(
        authority(host, port),
        num_processes=place.count,
        process_id=place.index,
        cluster_detection_method="deactivate",  # it would give each process on Slurm one device
        initialization_timeout=max(1, round(place.start_timeout_s)),
        coordinator_bind_address=listen_at(place, port),
    )
    shape, devices = MeshShape.parse(options.device.mesh), jax.devices()
    if len(devices) != shape.devices:
        here = len(jax.local_devices())
        raise ConfigError(
            f"mesh {shape} needs {shape.devices} devices; {place.count} hosts have {len(devices)}, this one {here}; "
            f"try --mesh 1x{len(devices)}"
        )
    if jax.process_index() != place.index:
        raise ConfigError(
            f"the devices call this host {jax.process_index()}, not {place.index}; give each host the --host-index "
            "that its devices have"
        )
    return meshes(shape, devices)[0]


class Finishing:
    """Says when launches have finished, in their order, by a thread that waits for them."""

    def __init__(self, tell: Callable[[int, bytes], None]):
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hosts finish")

    def wait(self, number: int, output: StepOutput | jax.Array) -> None:
        """`tell(number, digest of the tokens)` once the output is there."""
        self._thread.submit(self._wait, number, output)

    def _wait(self, number: int, output: StepOutput | jax.Array) -> None:
        digest = b""
        if isinstance(output, StepOutput):  # each device has its own copy of the tokens, and goes on with that
            digest = hashlib.blake2b(np.asarray(output.tokens).tobytes(), digest_size=8).digest()
        else:
            jax.block_until_ready(output)
        self._tell(number, digest)


class Leading:
    """The followers, to the engine of host 0."""

    def __init__(self, leader: Leader):
        self._leader, self._finishing = leader, Finishing(leader.finished)

    def wait_ready(self, runner: Runner, progress: Progress) -> None:
        """Returns when every follower can run launches. Raises EngineStopped."""
        self._leader.wait_ready(str(runner.sizes), progress)

    def least(self, pages: int) -> int:
        return self._leader.least(pages)

    def known(self, shape: Shape) -> bool:
        return self._leader.known((shape.tokens, shape.seqs))

    def begin(self, launch: Launch) -> int:
        bindings = [[np.asarray(array).tobytes() for array in binding] for binding in launch.bindings]
        return self._leader.announce((launch.shape.tokens, launch.shape.seqs), launch.buffer.tobytes(), bindings)

    def launched(self, number: int, output: StepOutput | jax.Array) -> None:
        self._finishing.wait(number, output)

    def failure(self) -> JaxserveError | None:
        return self._leader.failure(CAUSE_S)

    def stop(self, error: JaxserveError | None) -> None:
        self._leader.stop(error)
