"""The whole interface, as its own description has it, asked by machines; and OpenAI's client."""

from __future__ import annotations

import base64
import io

import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")
pytest.importorskip("openai")

import openai
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    status_code_conformance,
)
from tests.serve.stand_in import Serving, stand_in_app

from lowtide.serve.limits import Limits

CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance
)  # fmt: skip
LIMITS = Limits(steps=4, pictures=2, queued=5, frames=9)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    app, dispatcher = stand_in_app(tmp_path_factory.mktemp("api"), limits=LIMITS)
    with Serving(app, dispatcher) as serving:
        yield serving


def check_all(serving, examples):
    """Ask every route what its description allows, and what it does not."""
    description = schemathesis.openapi.from_url(f"{serving.address}/openapi.json")
    operations = [each.ok() for each in description.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=examples, derandomize=True, deadline=None, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                case.call_and_validate(checks=CHECKS, timeout=20)

            if mode.is_positive or len(operation.body) or len(operation.query):  # any text is an id
                check()


def test_no_request_is_a_fault_and_every_answer_is_declared(serving):
    check_all(serving, 8)


@pytest.mark.slow
def test_no_request_is_a_fault_among_many(serving):
    check_all(serving, 200)


def test_the_check_sees_a_fault(serving):
    worker = serving.dispatcher.worker
    worker.fault = RuntimeError("broken")
    try:
        status, headers, problem = serving.ask("POST", "/plan", {"prompt": "x", "width": 8, "height": 16})
    finally:
        worker.fault = None
    assert (status, headers["Content-Type"]) == (500, "application/problem+json")
    assert headers["X-Request-ID"]
    assert "RuntimeError" in problem["detail"]
    assert "broken" not in str(problem)


# ---- OpenAI's client


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=f"{serving.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_lists_the_models(client):
    assert [model.id for model in client.models.list()] == ["seascapes"]
    assert client.models.retrieve("seascapes").id == "seascapes"


def test_openais_client_makes_pictures(client, serving):
    asked = {"model": "seascapes", "prompt": "a boat", "size": "64x64", "n": 2}
    made = client.images.generate(**asked, extra_body={"num_inference_steps": 2, "seed": 7})
    assert [Image.open(io.BytesIO(base64.b64decode(each.b64_json))).size for each in made.data] == [(8, 8)] * 2
    made = client.images.generate(**asked, response_format="url")
    path = made.data[1].url.removeprefix(serving.address)
    status, headers, _ = serving.ask("GET", path)
    assert (status, headers["Content-Type"]) == (200, "image/png")


def test_openais_client_is_told_what_is_wrong(client):
    with pytest.raises(openai.UnprocessableEntityError, match="size"):
        client.images.generate(prompt="a boat", size="huge")
    with pytest.raises(openai.UnprocessableEntityError, match="Too little memory"):
        client.images.generate(prompt="a boat", size="1024x1024")
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3'"):
        client.images.generate(prompt="a boat", model="dall-e-3")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


def test_openais_client_needs_a_key_where_keys_are(tmp_path):
    app, dispatcher = stand_in_app(tmp_path, keys=("a key that is long enough",))
    with Serving(app, dispatcher) as serving:
        for key, works in (("a key that is long enough", True), ("another", False)):
            with openai.OpenAI(base_url=f"{serving.address}/v1", api_key=key, max_retries=0) as client:
                if works:
                    assert client.models.list().data
                else:
                    with pytest.raises(openai.AuthenticationError, match="key"):
                        client.models.list()
