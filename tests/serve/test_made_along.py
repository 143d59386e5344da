"""Jobs that are alike: a running one makes pictures of those that wait, which are then not made again."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("fastapi")

from tests.serve.stand_in import Serving, stand_in_app

from lowtide.planning.plan import UP_TO_ROUNDING
from lowtide.serve.limits import Limits

ASKED = {"prompt": "a boat", "width": 64, "height": 64, "num_inference_steps": 5}


@pytest.mark.parametrize("together", [1, 3])
def test_alike_jobs(tmp_path, together):
    app, dispatcher = stand_in_app(tmp_path, pause=0.03, limits=Limits(together=together))
    with Serving(app, dispatcher) as serving:
        wide = {**ASKED, "width": 128}
        asked = (wide, ASKED, {**ASKED, "prompt": "a tree"}, wide, ASKED)
        first, *others = [serving.ask("POST", "/jobs", each)[2] for each in asked]
        is_rounded = [job["plan"]["exactness"] == UP_TO_ROUNDING for job in (first, *others)]
        assert is_rounded == [together > 1] * 5
        ids = [job["id"] for job in others]
        while serving.ask("GET", f"/jobs/{ids[-1]}")[2]["state"] != "done":
            time.sleep(0.05)
        along = dispatcher.worker.along
        assert along[first["id"]] == [], "nothing waited then"
        assert along[ids[0]] == ([ids[1], ids[3]] if together > 1 else []), "not the wide one"
        assert list(along)[1:] == ids, "each had its turn, in order"
