"""What this process may use of the memory, on made-up machines."""

from pathlib import Path

import pytest

from jaxserve.host_memory import HostMemory, host_memory

MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", f"MemTotal: {64 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {48 * 1024} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder: Path, limit: str, used: int, reclaimable: int, *, version: int) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    statistic = "inactive_file" if version == 2 else "total_inactive_file"
    write(folder / names[0], f"{limit}\n")
    write(folder / names[1], f"{used}\n")
    write(folder / "memory.stat", f"anon 7\n{statistic} {reclaimable}\n")


def test_a_machine_without_control_groups(machine: Path) -> None:
    assert host_memory(machine) == HostMemory(64 * MIB, 48 * MIB)


def test_the_narrowest_group_on_the_way_up_counts(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/pod/container\n")
    top = machine / "sys/fs/cgroup"
    group(top / "pod", str(32 * MIB), 30 * MIB, 0, version=2)
    group(top / "pod/container", str(40 * MIB), 10 * MIB, 4 * MIB, version=2)
    assert host_memory(machine) == HostMemory(32 * MIB, 2 * MIB)
    group(top / "pod", "max", 30 * MIB, 0, version=2)
    assert host_memory(machine) == HostMemory(40 * MIB, 34 * MIB), "cached files can be given up"


def test_a_container_that_sees_its_hosts_path(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/docker/0123\n")
    group(machine / "sys/fs/cgroup", str(16 * MIB), 20 * MIB, 0, version=2)
    assert host_memory(machine) == HostMemory(16 * MIB, 0)


def test_version_one(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "9:name=systemd:/x\n4:cpu,memory:/x\n1:cpu:/x\n")
    group(machine / "sys/fs/cgroup/memory", str(2**63 - 4096), 60 * MIB, 0, version=1)
    group(machine / "sys/fs/cgroup/memory/x", str(20 * MIB), 5 * MIB, MIB, version=1)
    assert host_memory(machine) == HostMemory(20 * MIB, 16 * MIB)


def test_this_machine() -> None:
    memory = host_memory()
    assert 0 < memory.free <= memory.total
