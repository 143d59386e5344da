"""Processors for tests: how fast they are in each dtype, whatever this one is."""

from lowtide.machine.dtype_speeds import DTYPES, DtypeSpeeds
from lowtide.planning import computing_dtype


def speeds(**times):
    """Speeds of a processor that takes so many times as long in each dtype."""
    return {dtype: DtypeSpeeds(*[1e11 / times.get(dtype, 100)] * 5) for dtype in DTYPES}


FOR_FLOAT32 = speeds(float32=1, bfloat16=60)
FOR_BFLOAT16 = speeds(float32=2, bfloat16=1)


def use(monkeypatch, of_processor):
    """Have this processor be one with these speeds; of None it is not known how fast it is."""
    monkeypatch.setattr(computing_dtype, "dtype_speeds", lambda: of_processor)
    monkeypatch.setattr(computing_dtype, "_told", set())
