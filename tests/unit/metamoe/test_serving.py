"""The server, by the stock client and by those who mean it harm."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

import metamoe
from metamoe.cli_serve import is_loopback
from metamoe.common.errors import InvalidSettingError
from metamoe.serving.app import Limits, serving_app
from tests.unit.metamoe.conftest import served


@pytest.fixture(scope="module")
def client(model: metamoe.Model) -> Iterator[TestClient]:
    app = serving_app(model.loaded, "bytes", Limits(at_once=8, queue=16, body=20_000))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def address(model: metamoe.Model) -> Iterator[str]:
    with served("serve", str(model.folder), "--name", "bytes") as address:
        yield address


def test_the_stock_client_asks_and_streams(address: str, model: metamoe.Model) -> None:
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    assert [one.id for one in client.models.list()] == ["bytes"]
    messages = [{"role": "user", "content": "Hi"}]
    expected = model.chat(messages, 12)
    answer = client.chat.completions.create(model="bytes", messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.reason
    assert answer.choices[0].metamoe["experts"] == pytest.approx(dict(expected.experts), abs=1e-5)
    assert answer.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="bytes", messages=messages, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len(chunks) > 8
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    found = client.completions.create(model="bytes", prompt=["a", "one two"], max_tokens=9, temperature=0)
    assert [one.text for one in found.choices] == [one.text for one in model.generate(["a", "one two"], 9)]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there is 'bytes'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="more than 128 together"):
        client.completions.create(model="bytes", prompt="a" * 200)


def test_a_hundred_clients_at_once_lose_nothing(address: str, model: metamoe.Model) -> None:
    prompts = [f"prompt number {i}" + " and so on" * (i % 4) for i in range(100)]
    expected = model.generate(prompts, 10)

    def asked(prompt: str) -> str:
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
            if len(prompt) % 2:
                return client.completions.create(model="bytes", prompt=prompt, max_tokens=10, temperature=0).choices[0].text
            stream = client.completions.create(model="bytes", prompt=prompt, max_tokens=10, temperature=0, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(asked, prompts)) == [one.text for one in expected]


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    before = client.get("/metrics").text
    client.post("/v1/completions", json={"model": "bytes", "prompt": "abc", "max_tokens": 5})
    after = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    for name, more in (
        ('metamoe_tokens_total{kind="prompt"}', 3),
        ('metamoe_tokens_total{kind="completion"}', 5),
        ('metamoe_requests_total{path="/v1/completions",status="200"}', 1),
    ):
        assert value(after, name) - value(before, name) == more
    assert value(after, "metamoe_waiting") == value(after, "metamoe_computed") == 0


def test_a_token_is_wanted_where_one_is_set_and_other_names_are_refused(model: metamoe.Model, client: TestClient) -> None:
    app = serving_app(model.loaded, "bytes", Limits(), token="right", loopback=False)
    with TestClient(app) as guarded:
        assert guarded.get("/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            assert guarded.get("/v1/models", headers=header).status_code == 401
        assert guarded.get("/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0")] == [True, True, True, False]
    with pytest.raises(InvalidSettingError, match="--host here"):
        is_loopback("here")


def test_limits_are_named_errors(client: TestClient) -> None:
    large = client.post("/v1/completions", json={"model": "bytes", "prompt": "a" * 20_000})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    many = client.post("/v1/completions", json={"model": "bytes", "prompt": ["a"] * 30, "max_tokens": 3})
    assert (many.status_code, many.json()["error"]["code"]) == (429, "busy")
    fine = client.post("/v1/completions", json={"model": "bytes", "prompt": ["a"] * 20, "max_tokens": 3})
    assert fine.status_code == 200
    missing = client.post("/v1/completions", json={"model": "bytes"}).json()["error"]
    assert (missing["param"], missing["message"]) == ("prompt", "prompt: Field required")
    unknown = client.post("/v1/completions", json={"model": "bytes", "prompt": "a", "logprobs": 3}).json()["error"]
    assert unknown["param"] == "logprobs"
    text = client.post("/v1/classify", json={"model": "bytes", "images": ["aGk="]})
    assert "this model is one of text" in text.json()["error"]["message"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "n",
    "stream",
    "images",
    "classes",
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/classify")
FINE = {"model": "bytes", "prompt": "a", "max_tokens": 1}


def hostile(client: TestClient, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (path, body, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def try_hostile(client: TestClient, count: int) -> None:
    quick = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)

    @quick
    @given(
        st.sampled_from(PATHS),
        st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), ANYTHING, max_size=6),
        st.booleans(),
        st.binary(max_size=12),
    )
    def ask(path: str, body: dict[str, object], valid: bool, raw: bytes) -> None:
        told = {"model": "bytes", **body, "max_tokens": 1} if valid else body
        # NaN, lone surrogates and integers of any length pass through Python's json; raw bytes break it.
        hostile(client, path, json.dumps(told).encode("utf-8", "surrogatepass") + (b"" if valid else raw))

    ask()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/v1/completions", json=FINE).status_code == 200


def test_hostile_requests_end_in_4xx(client: TestClient) -> None:
    for body in (
        b"",
        b"[" * 9_000,
        b"1" * 9_000,
        b'{"model": "\\ud800"}',
        b'{"model": "bytes", "prompt": "\\ud800"}',
        b"\xff\xfe",
    ):
        for path in PATHS:
            hostile(client, path, body)
    hostile(client, PATHS[0], b'{"model": "bytes", "prompt": "a", "\\ud800": 1}')
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.put("/v1/models").status_code == 405
    try_hostile(client, 150)


@pytest.mark.slow
def test_ten_thousand_hostile_requests_end_in_4xx(client: TestClient) -> None:
    try_hostile(client, 10_000)


def test_images_are_classified(finished: Path) -> None:
    model = metamoe.load(finished / "model")
    image = Image.new("L", (32, 32), 255)
    image.paste(0, (8, 8, 20, 28))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    with TestClient(serving_app(model.loaded, "glyphs", Limits()), base_url="http://localhost") as client:
        images = [encoded, f"data:image/png;base64,{encoded}"]
        names = ["DIGIT ONE", "DIGIT TWO"]
        told = client.post("/v1/classify", json={"model": "glyphs", "images": images, "classes": names, "top": 2}).json()
        expected = model.predict(image, names, 2)
        for one in told["data"]:
            assert {c["name"]: c["probability"] for c in one["classes"]} == pytest.approx(dict(expected.classes))
            assert one["metamoe"]["experts"] == pytest.approx({name: share for name, share in expected.experts if share})
        for wrong in ("", "aGk=", "%%", "é"):
            answer = client.post("/v1/classify", json={"model": "glyphs", "images": [wrong]})
            assert answer.status_code == 400
            assert "images[0] is no image" in answer.json()["error"]["message"]
        answer = client.post("/v1/completions", json={"model": "glyphs", "prompt": "a"})
        assert "one of images" in answer.json()["error"]["message"]
