"""Memory for dequantized weights: one run's is neither taken, nor kept alive, nor dropped by another's."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from lowtide.casting.scratch import Scratch

CPU = torch.device("cpu")


def test_a_buffer_comes_again_and_the_largest_is_kept():
    scratch = Scratch()
    small = scratch.take(8, CPU)
    large = scratch.take(32, CPU)
    scratch.give(small)
    scratch.give(large)
    assert scratch.take(16, CPU) is large


def test_a_thread_neither_takes_nor_keeps_what_another_one_lent():
    scratch = Scratch()
    large = scratch.take(2**20, CPU)
    scratch.give(large)
    alive = weakref.ref(large)
    del large
    with ThreadPoolExecutor(1) as pool:
        own = pool.submit(scratch.take, 8, CPU).result()
        assert own.numel() == 8
        scratch.release()
        assert alive() is None
        pool.submit(scratch.give, own).result()
        scratch.release()  # of this thread: the other's is lent again
        assert pool.submit(scratch.take, 8, CPU).result() is own


def test_what_a_thread_kept_goes_with_it():
    scratch, alive = Scratch(), []

    def run():
        buffer = scratch.take(8, CPU)
        alive.append(weakref.ref(buffer))
        scratch.give(buffer)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert alive[0]() is None
