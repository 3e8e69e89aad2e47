"""Which of several hosts this is: from the options, and where they do not say, from what started it."""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.config import EngineOptions, HostOptions, HostPlace, MeshShape, ServerOptions
from jaxserve.errors import ConfigError

DEFAULT_PORT = 8900
METADATA_TIMEOUT_S = 2.0
_CURE = "give --hosts N, --host-index and --coordinator HOST:PORT"


def place(options: HostOptions, environ: Mapping[str, str] = os.environ) -> HostPlace | None:
    """This host's place among several; None where there is but one. Raises ConfigError for what does not fit."""
    if options.hosts == 1:
        given = [name for name in ("host_index", "coordinator") if getattr(options, name) is not None]
        if given:
            raise ConfigError(f"{given[0]} is for several hosts; say how many with --hosts")
        return None
    index, coordinator, count = options.host_index, options.coordinator, options.hosts
    if index is None or coordinator is None or count == "auto":
        found = detect(environ)
        if found is None:
            raise ConfigError(f"nothing here says which of several hosts this is; {_CURE}")
        if count not in ("auto", found.count):
            raise ConfigError(f"hosts is {count}, and {found.source} says {found.count}; give --hosts auto")
        if found.count == 1:
            return None
        count = found.count
        index = found.index if index is None else index
        coordinator = coordinator or found.coordinator
    assert isinstance(count, int)
    if index >= count:
        raise ConfigError(f"host_index {index} is none of {count} hosts, which count from 0")
    if not options.host_secret:
        raise ConfigError(
            "several hosts need a secret to know each other by: set JAXSERVE_HOST_SECRET to the same value on each, "
            "for instance what `openssl rand -hex 16` gives"
        )
    host, port = _address(coordinator)
    return HostPlace(
        index=index,
        count=count,
        coordinator=host,
        port=port,
        secret=options.host_secret,
        timeout_s=options.host_timeout,
        start_timeout_s=options.host_start_timeout,
    )


def check_served(options: EngineOptions, server: ServerOptions) -> None:
    """Raises ConfigError for what several hosts do not serve."""
    shape = None if options.device.mesh is None else MeshShape.parse(options.device.mesh)
    if shape is None:
        raise ConfigError("several hosts need --mesh: that of all their devices, 1x8 for two hosts of four each")
    if shape.data > 1:
        raise ConfigError(
            f"mesh {shape}: several hosts are one replica over all their devices; give data=1, and for more replicas "
            "start more such servers"
        )
    for name, why in (
        ("in_process", "host 0's engine must be able to end without its front end"),
        ("reload", "an edit would change one host alone"),
        ("admin_key", "new weights would change one host alone"),
    ):
        if getattr(server, name):
            raise ConfigError(f"{name} is not served with several hosts: {why}; leave it out")


@dataclass(frozen=True)
class Found:
    """What an environment says of this host."""

    source: str
    index: int
    count: int
    coordinator: str


def detect(environ: Mapping[str, str]) -> Found | None:
    """The first environment that says. Raises ConfigError for one that says what is not served."""
    for source in (_leader_worker_set, _cloud_tpu, _slurm, _tpu_vm):
        found = source(environ)
        if found is not None:
            return found
    return None


def _leader_worker_set(environ: Mapping[str, str]) -> Found | None:
    """https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/"""
    names = ("LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS")
    if any(name not in environ for name in names):
        return None
    index, size = (_number(environ, name) for name in names[:2])
    return Found("LeaderWorkerSet", index, size, environ[names[2]])


def _cloud_tpu(environ: Mapping[str, str]) -> Found | None:
    """As GKE sets them for the pods of a slice, in the order of its hosts."""
    if not environ.get("TPU_WORKER_HOSTNAMES") or "TPU_WORKER_ID" not in environ:
        return None
    if environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        raise ConfigError("several slices of TPUs are not served as one engine; start a server on each")
    names = environ["TPU_WORKER_HOSTNAMES"].split(",")
    return Found("TPU_WORKER_HOSTNAMES", _number(environ, "TPU_WORKER_ID"), len(names), names[0].strip())


def _slurm(environ: Mapping[str, str]) -> Found | None:
    """https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES"""
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")
    if any(name not in environ for name in names):
        return None
    index, tasks, nodes = (_number(environ, name) for name in names[:3])
    if tasks != nodes:
        raise ConfigError(f"Slurm runs {tasks} tasks on {nodes} nodes; run one on each: srun --ntasks-per-node=1")
    # node007, node007,other3 or node[007-015,020],other3
    first = re.match(r"([^,\[]+)(?:\[([^-,\]]+))?", environ[names[3]])
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST {environ[names[3]]!r} names no node; {_CURE}")
    return Found("Slurm", index, tasks, first[1] + (first[2] or ""))


def _tpu_vm(environ: Mapping[str, str]) -> Found | None:
    """A Cloud TPU VM, which only its metadata server tells of the slice's other hosts."""
    try:
        index = _metadata(environ, "agent-worker-number")
        workers = _metadata(environ, "worker-network-endpoints").split(",")
    except (urllib.error.URLError, TimeoutError, OSError):
        return None
    # Each a name, or NAME:ID:IP.
    return Found("the TPU VM's metadata", int(index), len(workers), workers[0].split(":")[-1])


def _metadata(environ: Mapping[str, str], key: str) -> str:
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=METADATA_TIMEOUT_S) as answer:
        return str(answer.read().decode()).strip()


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdigit():
        raise ConfigError(f"{name} is {environ[name]!r}, which is no number; {_CURE}")
    return int(environ[name])


def _address(text: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT, [IPV6] or [IPV6]:PORT."""
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d{1,5}))?", text)
    port = DEFAULT_PORT if found is None or found[3] is None else int(found[3])
    if found is None or not 0 < port < 65536:
        raise ConfigError(f"coordinator {text!r} is no address; give HOST or HOST:PORT")
    return found[1] or found[2], port
