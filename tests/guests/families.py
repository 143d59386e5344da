"""All guests by name: builders of tiny pipelines of the peer, each imported only when it is built."""

from __future__ import annotations

from collections.abc import Callable

from tests.guests.families_ltx import LTX
from tests.guests.families_modular import MODULAR
from tests.guests.families_newer import NEWER
from tests.guests.families_one_stream import ONE_STREAM
from tests.guests.families_two_stages import TWO_STAGES
from tests.guests.families_two_streams import TWO_STREAMS
from tests.guests.families_unets import UNETS
from tests.guests.families_videos import VIDEOS
from tests.guests.family import Family, run

__all__ = ["FAMILIES", "Family", "run"]

FAMILIES: dict[str, Callable[[], Family]] = {
    **UNETS,
    **TWO_STREAMS,
    **ONE_STREAM,
    **VIDEOS,
    **LTX,
    **TWO_STAGES,
    **MODULAR,
    **NEWER,
}
