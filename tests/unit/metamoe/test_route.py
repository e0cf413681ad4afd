"""The router before an engine that serves the experts by their names: PEFT, in a server of its own."""

import json
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from peft import PeftModel
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

import metamoe
from metamoe.common.errors import InvalidSettingError
from metamoe.common.presets import changed
from metamoe.export import export_adapters
from metamoe.serving.route import inexact, prompt_routing, routing_app
from tests.unit.metamoe.conftest import byte_model, served

EXACT = ("router.top-k=1", "router.context=1", "router.learn-context=false", "router-training.supervision=none")
PROMPTS = [f"{word} {i}" for i, word in enumerate(["Where", "do", "fish", "live?", "größer", "als", "one", "two"])]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> metamoe.Model:
    return byte_model(tmp_path_factory.mktemp("exact"), *EXACT)


@pytest.fixture(scope="module")
def engine(exact: metamoe.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that goes on from prompts with the adapter that "model" names."""
    out = tmp_path_factory.mktemp("adapters") / "out"
    export_adapters(exact.folder, out)
    place = exact.manifest.seed_model
    tokenizer = AutoTokenizer.from_pretrained(place)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), out / "one", "one")
    for name in ("two", "three"):
        peft.load_adapter(out / name, name)
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        told = await request.json()
        ids = torch.tensor([tokenizer(told["prompt"])["input_ids"]])
        with torch.inference_mode():
            if told["model"] == "seed":
                with peft.disable_adapter():
                    made = peft.generate(input_ids=ids, max_new_tokens=told["max_tokens"], do_sample=False)
            else:
                peft.set_adapter(told["model"])
                made = peft.generate(input_ids=ids, max_new_tokens=told["max_tokens"], do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        content = json.dumps({"model": told["model"], "choices": [{"text": text}], "extra": told.get("extra")})
        return StreamingResponse(iter([content[:5], content[5:]]), 201, media_type="application/json")

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def proxy(exact: metamoe.Model, engine: str) -> Iterator[TestClient]:
    # Loaded anew: the router lets go of the model's upper layers.
    route = prompt_routing(metamoe.load(exact.folder).loaded, 0)
    app = routing_app("unified", httpx.AsyncClient(base_url=engine), route, "seed", 10_000)
    with TestClient(app) as client:
        yield client


def test_answers_are_the_unified_models_token_by_token(exact: metamoe.Model, proxy: TestClient) -> None:
    assert inexact(exact.manifest) == ""
    asked = set()
    for prompt in PROMPTS:
        body = {"model": "unified", "prompt": prompt, "max_tokens": 20, "extra": [1]}
        answer = proxy.post("/v1/completions", json=body)
        assert answer.status_code == 201
        expected = exact.generate(prompt, 20)
        told = answer.json()
        assert told["choices"][0]["text"] == expected.text
        assert told["extra"] == [1]
        assert (told["model"], answer.headers["x-metamoe-expert"]) == (expected.experts[0][0],) * 2
        asked.add(told["model"])
    assert len(asked) > 2


def test_the_router_decides_as_the_whole_model_does_beyond_the_prompt(model: metamoe.Model) -> None:
    route = prompt_routing(metamoe.load(model.folder).loaded, 0)
    for prompt in PROMPTS:
        # Of what follows the prompt, all tokens ask the same: those whose weight is largest.
        assert route(prompt) == max(model.generate(prompt, 3).experts, key=lambda pair: pair[1])[0]


def test_what_is_not_exact_is_said_and_what_cannot_be_is_refused(exact: metamoe.Model, model: metamoe.Model) -> None:
    assert "router.top-k = 2" in inexact(model.manifest)
    for change, why in (("renormalise=false", "weight 1"), ("learn-context=true", "fixed at 1"), ("context=0.9", "fixed at 1")):
        router = changed(metamoe.Settings(), [*EXACT, f"router.{change}"]).router
        assert why in inexact(exact.manifest.model_copy(update={"router": router}))
    each = changed(metamoe.Settings(), ["router.decide=per-layer", "router.evidence=layer", "router.vectors=private"]).router
    with pytest.raises(InvalidSettingError, match="every layer asks other experts"):
        inexact(exact.manifest.model_copy(update={"router": each}))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[", 400),
        (b"[]", 400),
        (b"[" * 9_000, 400),
        (b'{"model": "unified"}', 400),
        (b'{"model": "unified", "prompt": "\\ud800"}', 400),
        (b'{"model": "unified", "prompt": ["a", "b"]}', 400),
        (b'{"model": "unified", "prompt": ""}', 400),
        (b'{"model": "other", "prompt": "a"}', 404),
        (json.dumps({"model": "unified", "prompt": "a" * 300}).encode(), 400),
        (b" " * 20_000, 413),
    ],
)
def test_wrong_requests_do_not_reach_the_engine(body: bytes, status: int, proxy: TestClient) -> None:
    answer = proxy.post("/v1/completions", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_an_engine_that_is_not_there_is_named(exact: metamoe.Model) -> None:
    route = prompt_routing(metamoe.load(exact.folder).loaded, 0)
    with TestClient(routing_app("unified", httpx.AsyncClient(base_url="http://127.0.0.1:1"), route, "seed", 10_000)) as client:
        answer = client.post("/v1/completions", json={"model": "unified", "prompt": "a"})
        assert answer.status_code == 502
        assert "the engine cannot be reached" in answer.json()["error"]["message"]
        assert client.get("/v1/models").json()["data"][0]["id"] == "unified"


@pytest.mark.slow
def test_the_command_stands_before_an_engine(exact: metamoe.Model, engine: str) -> None:
    with served("route", str(exact.folder), "--engine", engine, "--name", "unified") as address:
        answer = httpx.post(f"{address}/completions", json={"model": "unified", "prompt": "fish", "max_tokens": 9}, timeout=120)
        assert answer.json()["choices"][0]["text"] == exact.generate("fish", 9).text


@pytest.mark.parametrize("url", ["nowhere", "ftp://127.0.0.1", "http://"])
def test_a_wrong_address_of_an_engine_is_named(
    url: str, exact: metamoe.Model, run_metamoe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_metamoe("route", str(exact.folder), "--engine", url) == InvalidSettingError.exit_code
    assert f"--engine {url}" in capsys.readouterr().err
