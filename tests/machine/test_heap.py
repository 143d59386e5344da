"""The heap of this process."""

from lowtide.machine import heap


def test_the_heap_can_be_trimmed_or_it_is_told():
    assert isinstance(heap.trim_heap(), bool)
