"""In which dtype is computed on made-up processors, and what is said of slow ones."""

import pytest
from tests.planning import processors

from lowtide.machine.dtype_speeds import DtypeSpeeds
from lowtide.planning.computing_dtype import Kind, fastest_first, first_that_fits, in_words, ranked, slow_warning
from lowtide.planning.plan import BudgetError, Budgets

BOTH = ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("of_processor", "order"),
    [
        (processors.FOR_FLOAT32, BOTH),
        (processors.FOR_BFLOAT16, BOTH[::-1]),
        (processors.speeds(float32=1.02, bfloat16=1), BOTH),
        (None, BOTH),
    ],
    ids=["float32", "bfloat16", "as fast", "not known"],
)
def test_the_fastest_is_first_and_of_those_as_fast_the_one_named_first(of_processor, order):
    assert fastest_first(Kind.PRODUCTS, BOTH, of_processor) == order


def test_what_networks_compute_decides():
    """A processor with matrix instructions for bfloat16, in which its convolutions are slow."""
    plain = DtypeSpeeds(*[1e11] * 5)
    mixed = DtypeSpeeds(convolution=3e10, channels_last=3e10, product=1e12, attention=1e11, touched=1e11)
    of_processor = {"float32": plain, "bfloat16": mixed}
    assert fastest_first(Kind.PRODUCTS, BOTH, of_processor)[0] == "bfloat16"
    assert fastest_first(Kind.CONVOLUTIONS, BOTH, of_processor)[0] == "float32"


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr("lowtide.planning.computing_dtype.dtype_speeds", lambda: pytest.fail("it was measured"))
    assert ranked(Kind.PRODUCTS, ("float16",)) == ("float16",)


def test_a_slow_dtype_is_told_once_with_its_factor(monkeypatch):
    processors.use(monkeypatch, processors.FOR_FLOAT32)
    assert slow_warning(Kind.CONVOLUTIONS, "bfloat16").endswith("takes 60 times as long as in float32.")
    assert slow_warning(Kind.CONVOLUTIONS, "bfloat16") is None
    assert slow_warning(Kind.CONVOLUTIONS, "float32") is None


def test_nothing_is_said_where_nothing_is_known(monkeypatch):
    processors.use(monkeypatch, None)
    assert slow_warning(Kind.CONVOLUTIONS, "float16") is None
    assert in_words(Kind.CONVOLUTIONS, "float32") is None


def test_why_is_said_in_figures(monkeypatch):
    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    assert in_words(Kind.PRODUCTS, "bfloat16") == (
        "Computing in bfloat16: by what was measured here, float32 takes 2.0× as long."
    )


def test_memory_decides_where_only_a_slower_dtype_fits():
    def within(budget):
        def attempt(dtype):
            least = {"float32": 200, "bfloat16": 100}[dtype]
            if least > budget:
                raise BudgetError("too little", "more", Budgets(ram=least))
            return least

        return attempt

    assert first_that_fits(BOTH, within(300)) == ("float32", 200)
    assert first_that_fits(BOTH, within(150)) == ("bfloat16", 100)
    with pytest.raises(BudgetError) as refusal:
        first_that_fits(BOTH, within(50))
    assert refusal.value.minimum.ram == 100
