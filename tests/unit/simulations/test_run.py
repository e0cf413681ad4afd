"""Whole runs in one process, small but real, and the command around them."""

import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from PIL import Image

from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_domain
from metamoe.common.errors import (
    EmptyPartitionError,
    InputFileError,
    InvalidSettingError,
    MetaMoEError,
    ModelFileError,
    PresetNotFoundError,
    ProtocolError,
    ProxyCountError,
    PublicDataMismatchError,
    RunFailedError,
    UnknownSettingError,
)
from metamoe.common.model.artifact import load_model
from metamoe.common.model.lora import load_adapter
from metamoe.common.presets import changed, to_toml, validated
from metamoe.common.wire import REQUEST, RecordDict, encode_reply
from metamoe.server.exchange import Ask
from metamoe.server.stages import run_stages
from metamoe.simulations.local import run_local
from metamoe.simulations.results import write_results


@pytest.fixture
def preset(small: Settings, tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(to_toml(small))
    return file


@pytest.mark.slow
def test_a_run_leaves_what_it_should_and_twice_the_same(small: Settings, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_local(small, tmp_path / name)
    out = tmp_path / "a"
    results = write_results(small, out, lambda _done, _total: None)
    assert (out / "proxies.json").read_bytes() == (tmp_path / "b" / "proxies.json").read_bytes()
    assert load_model(tmp_path / "b" / "model").manifest.model_hash == results["model"]

    proxies = json.loads((out / "proxies.json").read_text())["clients"]
    assert list(proxies) == ["digits", "greek", "arrows"]
    for record in proxies.values():
        assert len(set(record["ids"])) == len(record["scores"]) == 20

    assert results == json.loads((out / "results.json").read_text())
    assert set(results["accuracy"]) == {"zero-shot", "expert:digits", "expert:greek", "expert:arrows", "metamoe"}
    assert all(set(row) == {"digits", "greek", "arrows", "average"} for row in results["accuracy"].values())
    assert set(results["public_accuracy"]) == set(results["accuracy"])
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-3) for shares in results["routing"].values())
    for client in results["clients"]:
        # LoRA in float16, the vectors for the router [2, 16] and for selection [16] in float32, the shape of the former, a
        # triangle in float16, and the client's number.
        expected = 192 * 2 + 4 * 32 + 4 * 16 + 2 * (32 * 33 // 2) + 8
        assert client["bytes_up"] == sum(a["bytes"] for a in client["artifacts"]) == expected
        assert client["bytes_down"] > 8 * 20
        delivered = out / "clients" / client["name"]
        assert load_model(delivered / "model").manifest.model_hash == results["model"]
        own = json.loads((delivered / "accuracy.json").read_text())
        assert own["accuracy"] == pytest.approx(results["accuracy"]["metamoe"][client["name"]], abs=0.01)
    assert "| metamoe |" in (out / "report.md").read_text()
    assert json.loads((out / "server" / "summary.json").read_text())["reported"] == {}


def test_accuracy_is_reported_if_the_settings_allow_it_and_settings_matter(small: Settings, tmp_path: Path) -> None:
    values = small.model_dump() | {"report_accuracy": True, "clients": 4}
    values["lora"]["first_layer"] = 0
    values["router"] |= {"decide": "per-layer", "evidence": "layer", "rows": "dot", "vectors": "proxy"}
    settings = validated(values)
    run_local(settings, tmp_path)
    reported = json.loads((tmp_path / "server" / "summary.json").read_text())["reported"]
    assert set(reported) == {"digits-1", "greek", "arrows", "digits-2"}
    assert len(load_model(tmp_path / "model").model.routers) == 2


@pytest.mark.slow
def test_more_clients_than_experts_share_them(small: Settings, tmp_path: Path) -> None:
    settings = changed(small, ["experts.max=2"])
    run_local(settings, tmp_path)
    merged = json.loads((tmp_path / "server" / "summary.json").read_text())["merged"]
    [(name, clients)] = merged.items()
    assert len(clients) == 2
    names = load_model(tmp_path / "model").manifest.experts
    assert {*names, *clients} == {name, *settings.client_names}
    # The same model everywhere, with two experts and the seed to choose among.
    for client in settings.client_names:
        delivered = load_model(tmp_path / "clients" / client / "model")
        assert delivered.manifest.experts == names
        assert delivered.model.routers[0].rows.shape[0] == 3
    results = write_results(settings, tmp_path, lambda _done, _total: None)
    assert f"expert:{name}" in results["accuracy"]
    assert set(results["routing"]["digits"]) == {*names, "seed"}


@pytest.mark.slow
def test_replies_in_any_order_give_the_same_model(small: Settings, tmp_path: Path) -> None:
    def backwards(kind, requests):
        for node in reversed(requests):
            yield node, respond(kind, requests[node], Site(7 - node, tmp_path / "b" / "clients"))

    run_local(small, tmp_path / "a")
    run_stages(small, [5, 6, 7], backwards, tmp_path / "b")
    hashes = {load_model(tmp_path / name / "model").manifest.model_hash for name in "ab"}
    assert len(hashes) == 1


def test_a_client_that_lies_or_is_silent_is_named(small: Settings, tmp_path: Path) -> None:
    def twins(kind, requests):
        for node, content in requests.items():
            yield node, respond(kind, content, Site(0, tmp_path))

    with pytest.raises(RunFailedError, match="client digits"):
        run_stages(small, [0, 1, 2], twins, tmp_path / "twins")

    def elsewhere(kind, requests):
        for node, content in requests.items():
            content[REQUEST] = ConfigRecord({**content.config_records[REQUEST], "public": "0" * 64})
            try:
                yield node, respond(kind, content, Site(node, tmp_path))
            except MetaMoEError as error:
                yield node, error

    with pytest.raises(PublicDataMismatchError, match="node 0 could not answer 'profile'"):
        run_stages(small, [0, 1, 2], elsewhere, tmp_path / "elsewhere")

    def silent(kind, requests):
        for node, content in requests.items():
            if kind == "profile" or node != 1:
                yield node, respond(kind, content, Site(node, tmp_path))

    with pytest.raises(RunFailedError, match=r"no answer to 'expert'.*client greek"):
        run_stages(small, [0, 1, 2], silent, tmp_path / "silent")

    def poisoned(kind, requests):
        for node, content in requests.items():
            reply = respond(kind, content, Site(node, tmp_path))
            yield node, encode_reply({"x": np.zeros(3)}) if kind == "expert" and node == 2 else reply

    with pytest.raises(ProtocolError, match=r"client arrows, reply to 'expert': undeclared array 'x'"):
        run_stages(small, [0, 1, 2], poisoned, tmp_path / "poisoned")
    assert not (tmp_path / "poisoned" / "model").exists()


def dropping(out: Path, failing: dict[str, dict[int, RecordDict | MetaMoEError | None]]) -> Ask:
    """Nodes 10 to 12 are clients 0 to 2, each with a failure for a stage: an error, another reply, or silence."""

    def ask(kind, requests):
        for node, content in requests.items():
            site = Site(node - 10, out / "clients")
            reply = failing.get(kind, {}).get(node - 10, ...)
            if reply is ...:
                yield node, audited(kind, content, site, partial(respond, kind, site=site))
            elif reply is not None:
                yield node, reply

    return ask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "failure", "reason"),
    [
        ("profile", RunFailedError("Flower reports error 5: gone"), "node 11 could not answer 'profile'.*error 5: gone"),
        ("expert", None, "no answer to 'expert' .* from client greek"),
        ("expert", encode_reply({"x": np.zeros(3)}), "client greek, reply to 'expert': undeclared array 'x'"),
    ],
)
def test_at_the_quorum_a_run_ends_without_the_missing_one(
    stage: str, failure: RecordDict | MetaMoEError | None, reason: str, small: Settings, tmp_path: Path
) -> None:
    settings = validated(small.model_dump() | {"quorum": 2})
    run_stages(settings, [10, 11, 12], dropping(tmp_path, {stage: {1: failure}}), tmp_path)
    summary = json.loads((tmp_path / "server" / "summary.json").read_text())
    (missing,) = summary["missing"]
    assert (missing["name"], missing["stage"]) == ("greek", stage)
    assert re.search(reason, missing["reason"])
    assert load_model(tmp_path / "model").manifest.experts == ["digits", "arrows"]
    for name in ("digits", "arrows"):
        delivered = load_model(tmp_path / "clients" / name / "model")
        assert delivered.manifest.model_hash == summary["model"]
    assert not (tmp_path / "clients" / "greek" / "model").exists()

    # The others' proxies and experts are those of a run with all.
    run_local(small, tmp_path / "whole")
    proxies = [json.loads((folder / "proxies.json").read_text())["clients"] for folder in (tmp_path, tmp_path / "whole")]
    assert proxies[0]["arrows"]["ids"] == proxies[1]["arrows"]["ids"]
    # Another number of clients sums in another order.
    for part in ("scores", "relevance"):
        np.testing.assert_allclose(proxies[0]["arrows"][part], proxies[1]["arrows"][part], rtol=1e-12, atol=1e-12)
    experts = [load_adapter(folder / "server" / "experts" / "arrows") for folder in (tmp_path, tmp_path / "whole")]
    assert all(torch.equal(experts[0][name], experts[1][name]) for name in experts[1])

    results = write_results(settings, tmp_path, lambda _done, _total: None)
    assert set(results["routing"]["greek"]) == {"digits", "arrows", "seed"}
    assert results["missing"] == summary["missing"]
    assert "| greek | " + stage in (tmp_path / "report.md").read_text()


def test_a_model_that_one_client_did_not_take_is_whole(small: Settings, tmp_path: Path) -> None:
    settings = validated(small.model_dump() | {"quorum": 2})
    run_stages(settings, [10, 11, 12], dropping(tmp_path, {"deliver": {2: None}}), tmp_path)
    summary = json.loads((tmp_path / "server" / "summary.json").read_text())
    assert [(missing["name"], missing["stage"]) for missing in summary["missing"]] == [("arrows", "deliver")]
    assert load_model(tmp_path / "model").manifest.experts == ["digits", "greek", "arrows"]


@pytest.mark.slow
def test_below_the_quorum_a_run_ends_and_all_missing_are_named(small: Settings, tmp_path: Path) -> None:
    settings = validated(small.model_dump() | {"quorum": 2})
    failing = {"profile": {0: RunFailedError("gone")}, "expert": {2: RunFailedError("gone too")}}
    with pytest.raises(RunFailedError, match=r"client arrows .* gone too; missing before: digits; quorum = 2"):
        run_stages(settings, [10, 11, 12], dropping(tmp_path, failing), tmp_path)
    assert not (tmp_path / "model").exists()

    # It goes on without the one that proxies were chosen without, and with the other if that is back.
    with pytest.raises(RunFailedError, match="1 clients are left of the run; missing: digits, arrows; it is not connected"):
        run_stages(settings, [10, 11], dropping(tmp_path, {}), tmp_path)
    run_stages(settings, [10, 11, 12], dropping(tmp_path, {}), tmp_path)
    (missing,) = json.loads((tmp_path / "server" / "summary.json").read_text())["missing"]
    assert (missing["name"], missing["stage"]) == ("digits", "profile")
    assert load_model(tmp_path / "model").manifest.experts == ["greek", "arrows"]

    # One that never connected is missing too.
    run_stages(settings, [10, 12], dropping(tmp_path, {}), tmp_path / "two")
    (missing,) = json.loads((tmp_path / "two" / "server" / "summary.json").read_text())["missing"]
    assert missing == {"name": "greek", "stage": "profile", "reason": "it is not connected"}


@pytest.mark.slow
def test_the_command_from_simulation_to_prediction(preset: Path, tmp_path: Path, run_metamoe, capsys) -> None:
    out = tmp_path / "out"
    assert run_metamoe("simulate", "--preset", str(preset), "--out", str(out), "--backend", "local", "--seed", "3") == 0
    assert "seed = 3" in (out / "settings.toml").read_text()
    assert "metamoe" in capsys.readouterr().out

    image = tmp_path / "digit.png"
    load_domain(validated({}).data, "digits", "test")[0]["image"].save(image)
    assert run_metamoe("predict", str(out / "model"), str(image), "--top", "2") == 0
    shown = capsys.readouterr().out
    assert "digit.png" in shown
    assert any(name in shown for name in ("digits", "greek", "arrows"))

    classes = tmp_path / "classes.txt"
    classes.write_text("DIGIT ONE\n\nDIGIT TWO\n")
    assert run_metamoe("predict", str(out / "model"), str(image), "--classes", str(classes)) == 0
    shown = capsys.readouterr().out
    assert "DIGIT ONE" in shown
    assert "DIGIT TWO" in shown

    # Nothing is lost: a folder with a run in it is kept unless told otherwise, one with anything else always.
    again = ("simulate", "--preset", str(preset), "--out", str(out), "--backend", "local")
    assert run_metamoe(*again) == InvalidSettingError.exit_code
    assert "--overwrite" in capsys.readouterr().err
    (out / "thesis.tex").write_text("years of work")
    assert run_metamoe(*again, "--overwrite") == InvalidSettingError.exit_code
    assert "thesis.tex" in capsys.readouterr().err
    assert (out / "results.json").is_file()

    # What a killed write left goes with the run; a run stays if its successor could not start.
    (out / "thesis.tex").unlink()
    (out / ".model-0123").mkdir()
    assert run_metamoe(*again, "--overwrite", "--set", "data.domains=['runes']") == InvalidSettingError.exit_code
    assert (out / "results.json").is_file()
    assert run_metamoe(*again, "--overwrite") == 0
    assert not (out / ".model-0123").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["simulate", "--preset", "none"], PresetNotFoundError.exit_code, "none"),
        (["simulate", "--set", "nonsense=1"], UnknownSettingError.exit_code, "nonsense"),
        (["simulate", "--set", "proxies.count=3000"], ProxyCountError.exit_code, "3000"),
        (["simulate", "--clients", "0"], InvalidSettingError.exit_code, "clients = 0"),
        (["simulate", "--set", "data.domains=['runes']", "--backend", "local"], InvalidSettingError.exit_code, "runes"),
        (["simulate", "--set", "proxies.pool=300", "--backend", "local"], ProxyCountError.exit_code, "299 samples"),
        (["simulate", "--set", "seed-model=nowhere", "--backend", "local"], InputFileError.exit_code, "nowhere"),
        (["simulate", "--set", "lora.first-layer=9", "--backend", "local"], InvalidSettingError.exit_code, "layers 0 to 1"),
        (
            ["simulate", "--clients", "300", "--set", "data.domains=['digits']", "--set", "data.dirichlet=0.001"],
            EmptyPartitionError.exit_code,
            "300 clients share 'digits'",
        ),
        (["predict", "nowhere", "image.png"], ModelFileError.exit_code, "nowhere"),
        (["presets", "none"], PresetNotFoundError.exit_code, "none"),
        (["simulate", "--backend", "cloud"], 2, "cloud"),
    ],
)
def test_errors_are_one_line_with_their_own_code(
    arguments: list[str], code: int, message: str, preset: Path, tmp_path: Path, run_metamoe, capsys
) -> None:
    if arguments[0] == "simulate":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
        if "--preset" not in arguments:
            arguments += ["--preset", str(preset)]
        if "proxies.pool=300" in arguments:
            arguments += ["--set", "data.public-samples=299"]
    assert run_metamoe(*arguments) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "model").exists()


def test_a_folder_that_is_no_run_is_never_cleared(preset: Path, tmp_path: Path, run_metamoe, capsys) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    arguments = ("simulate", "--preset", str(preset), "--backend", "local", "--overwrite", "--out")
    assert run_metamoe(*arguments, str(tmp_path / "mine")) == InvalidSettingError.exit_code
    assert "not a run" in capsys.readouterr().err
    assert (tmp_path / "mine" / "model").is_dir()
    assert run_metamoe(*arguments, str(preset)) == InputFileError.exit_code
    assert run_metamoe(*arguments, "/proc/nothing") == InputFileError.exit_code


def test_files_that_are_no_images_are_named(small: Settings, tmp_path: Path, run_metamoe, capsys) -> None:
    run_local(small, tmp_path / "out")
    (tmp_path / "x.png").write_text("not an image")
    # Any size and mode will do.
    Image.new("RGBA", (70, 51)).save(tmp_path / "large.png")
    assert run_metamoe("predict", str(tmp_path / "out" / "model"), str(tmp_path / "large.png")) == 0
    assert run_metamoe("predict", str(tmp_path / "out" / "model"), str(tmp_path / "x.png")) == InputFileError.exit_code
    assert "x.png" in capsys.readouterr().err


def test_presets_and_version_are_shown(run_metamoe, capsys) -> None:
    assert run_metamoe("--version") == 0
    assert capsys.readouterr().out.strip() == version("metamoe-fl")
    assert run_metamoe("presets") == 0
    assert "metamoe simulate --preset glyphs" in capsys.readouterr().out
    assert run_metamoe("presets", "glyphs") == 0
    assert "[expert-training]" in capsys.readouterr().out
