"""What memory is used, and by what: the meter."""

from lowtide.memory.meter import Meter, StageReading, steady_malloc

__all__ = ["Meter", "StageReading", "steady_malloc"]
