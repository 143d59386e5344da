"""Plans of guests count a process that takes the same at all times: what this one takes, a collection must tell."""

import pytest
from tests.fitting.traced_once import traced_once  # noqa: F401
from tests.guests.guest_cases import steady


@pytest.fixture(autouse=True, scope="module")
def machine():
    with pytest.MonkeyPatch.context() as patched:
        steady(patched)
        yield
