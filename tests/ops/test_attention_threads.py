"""A backend chosen for one call is that of this call alone: PyTorch's switches are those of the whole process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.ops.test_attention import inputs, masks
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowtide.ops import attention as module
from lowtide.ops.attention import AttentionBackend, attention

CALLS = 200
SWITCHES = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def switches():
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def by_switches(name, *tensors, mask=None):
    """What PyTorch's public function gives with one kernel switched on."""
    with sdpa_kernel(SWITCHES[name]):
        return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("form", [(1, 256), (2, 7), (8, 40)], ids=str)
@pytest.mark.parametrize("name", SWITCHES)
def test_an_operator_gives_what_the_switched_function_gives_bit_for_bit(name, form, mask):
    tensors, chosen = inputs(*form), masks(heads=form[0])[mask]
    assert torch.equal(attention(*tensors, chosen, AttentionBackend(name)), by_switches(name, *tensors, mask=chosen))


@pytest.mark.parametrize("name", SWITCHES)
def test_gradients_are_those_of_the_switched_function(name):
    ours, theirs = ([one.requires_grad_() for one in inputs()] for _ in range(2))
    attention(*ours, None, AttentionBackend(name)).sum().backward()
    by_switches(name, *theirs).sum().backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_two_threads_with_two_backends_see_nothing_of_each_other():
    tensors, mask = inputs(), masks()["causal"]
    expected = {name: by_switches(name, *tensors, mask=mask) for name in SWITCHES}
    assert not torch.equal(*expected.values()), "a control: the kernels round otherwise"
    before, seen, done = switches(), set(), threading.Event()

    def call(name):
        with torch.no_grad():
            backend = AttentionBackend(name)
            return [torch.equal(attention(*tensors, mask, backend), expected[name]) for _ in range(CALLS)]

    def watch():
        while not done.is_set():
            seen.add(switches())

    with ThreadPoolExecutor() as pool:
        watching = pool.submit(watch)
        results = list(pool.map(call, expected))
        done.set()
        watching.result()
    assert all(map(all, results))
    assert seen == {before}


def test_no_switch_is_touched(monkeypatch):
    for name in ("enable_flash_sdp", "enable_math_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda _: pytest.fail("a switch of the process"))
    for name in SWITCHES:
        attention(*inputs(), None, AttentionBackend(name))


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_the_operators_of_cuda_take_what_they_are_given(name, mask, size, monkeypatch):
    """Their forms on meta, where nothing is computed: the arguments and the shape of the result are right."""
    q, k, v = (one.to("meta") for one in inputs(2, size))
    chosen = masks()[mask]
    asked = module.Inputs(q, k, v, None if chosen is None or name == "flash" else chosen.to("meta"), 0.3)
    monkeypatch.setattr(module, "_is_cuda", lambda _: True)
    assert module._KERNELS[name](asked).shape == q.shape
