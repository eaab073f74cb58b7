"""Cores and memory: the machine's, or a container's limits where they are less."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.model import machine
from service.model.machine import cores, memory_bytes


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    assert 1 <= cores(tmp_path) <= (os.cpu_count() or 1)
    assert memory_bytes(tmp_path) > 2**20
    assert 1 <= cores() <= cores(tmp_path)
    assert 2**20 < memory_bytes() <= memory_bytes(tmp_path)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("100000 100000\n", 1), ("50000 100000", 1), ("1000 100000", 1), ("100000000 100000", None), ("max 100000", None)],
)
def test_a_quota_of_processor_time_limits_the_cores(tmp_path: Path, stated: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(stated)
    assert cores(tmp_path) == (expected or cores(tmp_path / "no limits"))


@pytest.mark.parametrize(("stated", "expected"), [("1048576\n", 2**20), ("max\n", None), (str(2**62), None)])
def test_a_limit_of_memory_counts_where_it_is_less_than_the_machine_has(
    tmp_path: Path, stated: str, expected: int | None
) -> None:
    (tmp_path / "memory.max").write_text(stated)
    assert memory_bytes(tmp_path) == (expected or memory_bytes(tmp_path / "no limits"))


@pytest.mark.parametrize("stated", ["", "\n", "many", "-1", "0 0", "1 0", "100000"])
def test_what_cannot_be_understood_is_no_limit(tmp_path: Path, stated: str) -> None:
    (tmp_path / "cpu.max").write_text(stated)
    assert cores(tmp_path) == cores(tmp_path / "no limits")


@pytest.mark.parametrize(
    ("quota", "period", "expected"), [(100_000, 100_000, 1), (-1, 100_000, None), (50_000, 0, None)]
)
def test_the_files_of_cgroup_v1_count_too(tmp_path: Path, quota: int, period: int, expected: int | None) -> None:
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**28}\n")
    assert cores(tmp_path) == (expected or cores(tmp_path / "no limits"))
    assert memory_bytes(tmp_path) == 2**28


@pytest.mark.parametrize(("text", "expected"), [("96\n", 96), ("max\n", None)])
@pytest.mark.parametrize("name", ["pids.max", "pids/pids.max"])
def test_how_many_processes_a_container_may_have(tmp_path: Path, name: str, text: str, expected: int | None) -> None:
    assert machine.tasks(tmp_path) is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert machine.tasks(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_thread_gives_way_and_others_do_not() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    with ThreadPoolExecutor(1, initializer=machine.give_way) as pool:
        assert (pool.submit(priority).result(), priority()) == (min(19, before + machine.NICE), before)


@pytest.mark.parametrize(("device", "expected"), [("nvidia0", True), ("dxg", True), ("nvidiactl", False)])
def test_a_gpu_is_there_where_its_device_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: bool
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 0)  # as with a driver that does not answer
    (tmp_path / device).touch()
    assert machine.has_gpu(tmp_path) is expected
