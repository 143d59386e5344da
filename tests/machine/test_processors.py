"""Which kernels a processor has, and how much of it others take."""

import pytest

from lowtide.machine import processor_share
from lowtide.machine.processor_kernels import kernels
from lowtide.machine.processor_share import Share, Watch, is_busy


def test_kernels_are_told_by_the_names_that_people_know():
    assert kernels(frozenset({"avx2", "fma"})) == {
        "AVX2": True,
        "AVX-512": False,
        "VNNI": False,
        "AVX512_BF16": False,
        "AVX512_FP16": False,
        "AMX": False,
    }
    server = kernels(frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"}))
    assert [name for name, has in server.items() if not has] == ["AVX512_FP16"]
    assert kernels(frozenset({"asimd", "bf16"})) == {"NEON": True, "Arm bf16": True}
    assert kernels(frozenset()) == {}


@pytest.mark.parametrize(
    ("others", "threads", "busy"), [(0.1, 2, False), (0.5, 2, True), (1.5, 2, True), (1.0, 1, False)]
)
def test_others_make_a_machine_busy_where_they_take_what_our_threads_need(monkeypatch, others, threads, busy):
    monkeypatch.setattr(processor_share.psutil, "cpu_count", lambda: 2)
    assert Share(others, 0.0).was_busy(threads) is busy


def test_own_work_is_not_that_of_others(monkeypatch):
    clock = {"all": 10.0, "own": 4.0, "now": 0.0}
    monkeypatch.setattr(processor_share, "_all_seconds", lambda: clock["all"])
    monkeypatch.setattr(processor_share, "_own_seconds", lambda: clock["own"])
    monkeypatch.setattr(processor_share.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(processor_share.time, "sleep", lambda seconds: clock.update(now=clock["now"] + seconds))
    watch = Watch()
    clock.update(all=16.0, own=8.0, now=4.0)
    assert watch.share().others == pytest.approx(0.5)
    assert not is_busy(1)
