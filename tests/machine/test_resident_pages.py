"""Which bytes of this process are in memory."""

import mmap

import torch

from lowtide.machine.resident_pages import resident_bytes

PAGE = mmap.PAGESIZE


def test_pages_count_once_they_are_touched_and_each_once():
    area = mmap.mmap(-1, 64 * PAGE)
    start = torch.frombuffer(area, dtype=torch.uint8, count=1).data_ptr()
    ranges = [(start + index * PAGE, start + (index + 1) * PAGE) for index in range(64)]
    touched = resident_bytes(ranges)
    for index in (3, 4, 40):
        area[index * PAGE] = 1
    assert resident_bytes(ranges) <= touched + 3 * PAGE
    assert resident_bytes([ranges[3], ranges[4], (start + 3 * PAGE + 5, start + 5 * PAGE - 5)]) == 2 * PAGE


def test_where_the_system_does_not_say_all_count(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr("builtins.open", refuse)
    assert resident_bytes([(0, 10 * PAGE), (5 * PAGE, 20 * PAGE)]) == 20 * PAGE
