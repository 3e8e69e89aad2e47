"""How much main memory this process may use, control groups counted; what of it goes back, and what the GC may skip."""

import ctypes
import gc
import mmap
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostMemory:
    """Bytes of main memory, and those that could still be had."""

    total: int
    free: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Memory of the machine or of the container, whichever is less. `root` is where /proc and /sys are looked for."""
    memory = _machine(root)
    for limit, used in _control_groups(root):
        memory = HostMemory(min(memory.total, limit), min(memory.free, max(0, limit - used)))
    return memory


def _machine(root: Path) -> HostMemory:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: what is free is not known
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HostMemory(total, total)
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return HostMemory(kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024)


def _control_groups(root: Path) -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group, version 2 or 1, that holds this process and has a limit.

    Files and meaning: the Linux kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in entries:
        if controllers == "":
            mount, limit, used, reclaimable = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        group = Path(path.strip("/"))
        for folder in (group, *group.parents):  # inside a container the path may be the host's; the top is ours
            at = root / mount / folder
            try:
                most = int((at / limit).read_text())  # "max", which is no number: no limit
                held = int((at / used).read_text())
                statistics = dict(line.split() for line in (at / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            found.append((most, held - int(statistics.get(reclaimable, 0))))
    return found


def peak_memory() -> int:
    """Bytes of main memory that this process has had at most, pages of mapped files counted."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def drop_pages(file: mmap.mmap, begin: int, nbytes: int) -> None:
    """Lets go of what memory holds of a mapped file's bytes [begin, begin + nbytes); they can be read again."""
    first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end and hasattr(mmap, "MADV_DONTNEED"):  # not everywhere
        file.madvise(mmap.MADV_DONTNEED, first, end - first)


def give_back() -> None:
    """Returns memory that the C library keeps for later to the system, where it can: after much was freed at once."""
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def keep_objects() -> None:
    """Takes the Python objects that there are out of the collector's sight, in a process of our own once it is set up.

    A full collection would walk over JAX's several hundred thousand while requests wait.
    """
    gc.freeze()
