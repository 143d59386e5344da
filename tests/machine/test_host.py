"""Memory and processors within the limits of cgroups, on made-up hierarchies."""

import psutil
import pytest

from lowtide.machine import host

GIB = 2**30


@pytest.fixture
def cgroup(monkeypatch, tmp_path):
    """Make this process believe in the cgroup files given as {path: text}."""

    def make(own, files):
        (tmp_path / "self").write_text(own)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(host, "_OWN_CGROUP", tmp_path / "self")
        monkeypatch.setattr(host, "_CGROUP_ROOT", tmp_path / "fs")

    return make


def test_no_limit_is_the_machine(cgroup):
    cgroup("0::/a\n", {"a/memory.max": "max", "a/memory.current": "5"})
    assert host.host_memory().total == psutil.virtual_memory().total
    assert not host.host_memory().limited


def test_version_2_takes_the_tightest_of_the_hierarchy_and_counts_droppable_pages_as_free(cgroup):
    cgroup(
        "0::/a/b\n",
        {
            "a/memory.max": str(GIB // 2),
            "a/memory.current": str(GIB // 4),
            "a/memory.stat": f"anon 1\ninactive_file {GIB // 8}\n",
            "a/b/memory.max": "max",
            "a/b/memory.current": "0",
        },
    )
    memory = host.host_memory()
    assert (memory.total, memory.available, memory.limited) == (GIB // 2, GIB // 2 - GIB // 8, True)


def test_version_1(cgroup):
    cgroup(
        "5:devices:/\n4:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": str(GIB // 2),
            "memory/a/memory.usage_in_bytes": str(GIB),
            "memory/memory.limit_in_bytes": str(2**63 - 4096),
            "memory/memory.usage_in_bytes": str(GIB),
        },
    )
    assert host.host_memory() == host.HostMemory(GIB // 2, 0, limited=True)


def test_processors_granted_by_quota(cgroup):
    cgroup("0::/\n", {"cpu.max": "50000 100000"})
    assert host.usable_cpus() == 0.5
    cgroup("0::/\n", {"cpu.max": "max 100000"})
    assert host.usable_cpus() >= 1
