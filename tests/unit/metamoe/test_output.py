"""What goes where: results to standard output, as text or JSON, all else to standard error, and nothing of it with --quiet."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_domain
from metamoe.common.errors import InputFileError, UnknownSettingError
from metamoe.common.files import read_json
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import load_settings, to_toml, validated
from metamoe.deploy.processes import Party
from metamoe.reference import all_settings


@pytest.fixture
def preset(small: Settings, tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(to_toml(small))
    return file


@pytest.fixture
def lines(run_metamoe, capsys):
    """Run a command with --json; its exit code, and the objects that are all of its standard output."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        code = run_metamoe(*arguments, "--json")
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def image(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    load_domain(validated({}).data, "digits", "test")[0]["image"].save(folder / "1.png")
    return folder / "1.png"


@pytest.mark.slow
def test_a_simulation_prints_its_results_and_messages_go_elsewhere(
    preset: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("simulate", "--preset", str(preset), "--backend", "local", "--out", str(out))
    assert run_metamoe(*arguments, "--json") == 0
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    assert json.loads(line) == {**read_json(out / "results.json"), "folder": str(out)}
    assert f"-> {out}" in shown.err
    assert "3 server trains the router" in shown.err

    assert run_metamoe("--quiet", *arguments, "--overwrite") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.lstrip().startswith("accuracy on test data, %")
    assert "metamoe" in shown.out


def test_a_model_is_asked(finished: Path, tmp_path: Path, lines) -> None:
    file = image(tmp_path / "data" / "DIGIT ZERO")
    code, predictions = lines("predict", str(finished / "model"), str(file), str(file), "--top", "2")
    assert code == 0
    assert len(predictions) == 2
    experts = load_model(finished / "model").manifest.expert_names
    for prediction in predictions:
        assert prediction["image"] == str(file)
        first, second = prediction["classes"]
        assert 1 >= first["probability"] >= second["probability"] > 0
        assert set(prediction["experts"]) == set(experts)
        assert sum(prediction["experts"].values()) == pytest.approx(1)

    image(tmp_path / "data" / "DIGIT ONE")
    code, (result,) = lines("evaluate", str(finished / "model"), "--data", str(tmp_path / "data"))
    assert code == 0
    assert set(result) == {"task", "percent", "interval", "count", "experts", "metrics"}
    assert (result["task"], result["count"]) == ("images", 2)
    # One image under two names: one of them is right at most.
    assert result["percent"] in (0, 50)
    assert result["interval"][0] <= result["percent"] <= result["interval"][1]


def test_ledgers(finished: Path, tmp_path: Path, lines) -> None:
    code, (found,) = lines("audit", "verify", str(finished))
    assert (code, found["verdict"], found["findings"]) == (0, "fine", [])
    assert [ledger["name"] for ledger in found["ledgers"]] == ["client-0", "client-1", "client-2", "server"]
    *clients, server = found["ledgers"]
    assert sum(client["bytes_sent"] for client in clients) == server["bytes_received"] > 0
    key = (finished / "server" / "audit" / "audit.pub").read_text()
    assert server["key"] in key

    code, (same,) = lines("audit", "reconcile", str(finished))
    assert code == 0
    assert sorted(same["ledgers"], key=str) == sorted(found["ledgers"], key=str)

    code, (spent,) = lines("audit", "budget", str(finished), "--delta", "1e-6")
    assert code == 0
    assert (spent["verdict"], spent["delta"]) == ("fine", 1e-6)
    assert [entry["client"] for entry in spent["budget"]] == ["client-0", "client-1", "client-2"]
    for entry in spent["budget"]:
        assert (entry["epsilon"], entry["limits"]) == (0, [])
        expert = {"artifact": "expert", "releases": 1, "exact": 1, "epsilon": None}
        assert expert in entry["artifacts"]

    shutil.copytree(finished / "clients" / "audit" / "client-0", tmp_path / "client-0")
    ledger = tmp_path / "client-0" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    code, (harmed,) = lines("audit", "verify", str(tmp_path / "client-0"))
    assert (code, harmed["verdict"]) == (3, "tampered with")
    assert harmed["findings"][0].keys() == {"verdict", "where", "what"}


def test_a_policy_and_what_it_lets_out(preset: Path, lines, tmp_path: Path) -> None:
    code, (found,) = lines("audit", "policy", "--preset", str(preset), "--set", "report-accuracy=true")
    assert code == 0
    assert any(rule.startswith("Nothing else leaves") for rule in found["rules"])
    assert "expert" in found["policy"]["allow"]
    sends = {(sent["when"], sent["artifact"]): sent for sent in found["sends"]}
    # Two maps of one layer, two matrices each, 16 to 32 wide, of rank 2 in float16.
    assert sends["expert", "expert"] == {"when": "expert", "artifact": "expert", "arrays": 4, "bytes": 384, "allowed": True}
    assert not sends["deliver", "accuracy"]["allowed"]

    (tmp_path / "mine.toml").write_text("")
    code, nothing = lines("audit", "policy", "--write", str(tmp_path / "mine.toml"))
    assert (code, nothing) == (InputFileError.exit_code, [])


def test_a_folder_of_a_client(preset: Path, tmp_path: Path, lines) -> None:
    for split in ("train", "test"):
        image(tmp_path / "data" / split / "DIGIT ONE")
        image(tmp_path / "data" / split / "DIGIT TWO")
    (tmp_path / "data" / "train" / "DIGIT TWO" / "2.png").write_text("no image")
    code, (found,) = lines("client", "check", str(tmp_path / "data"), "--preset", str(preset))
    assert (code, found["fine"], found["kind"]) == (1, False, "images")
    assert found["counts"]["train"]["DIGIT ONE"] == found["counts"]["test"]["DIGIT TWO"] == 1
    assert any("2.png" in wrong for wrong in found["wrong"])
    assert found["bytes"] == sum(array["bytes"] for array in found["sent"])
    assert {"when": "profile", "name": "client", "dtype": "int64", "shape": [], "optional": False, "bytes": 8} in found["sent"]
    (tmp_path / "data" / "train" / "DIGIT TWO" / "2.png").unlink()
    code, (found,) = lines("client", "check", str(tmp_path / "data"), "--preset", str(preset))
    assert (code, found["fine"], found["wrong"]) == (0, True, [])


def test_a_federation(monkeypatch: pytest.MonkeyPatch, preset: Path, tmp_path: Path, lines, run_metamoe) -> None:
    parties = [Party("server", True, "", True), Party("client-0", False, "123", False)]
    monkeypatch.setattr("metamoe.deploy.processes.status", lambda _folder: parties)
    code, (found,) = lines("deploy", "status", str(tmp_path))
    assert (code, found["fine"]) == (1, False)
    assert found["parties"][1] == {"name": "client-0", "running": False, "node": "123", "online": False}

    assert run_metamoe("deploy", "keys", str(tmp_path / "federation"), "--port", "48123") == 0
    code, (found,) = lines("deploy", "doctor", str(tmp_path / "federation"), "--preset", str(preset))
    assert found["fine"] == (code == 0) == (not any(finding["problem"] for finding in found["findings"]))
    assert set(found["alike"]) == {"version", "seed model", "public set"}


def test_presets_and_settings(preset: Path, lines) -> None:
    code, (found,) = lines("presets")
    assert code == 0
    assert {"name": "glyphs", "command": "metamoe simulate --preset glyphs"} in found["presets"]
    code, (found,) = lines("presets", "glyphs")
    assert validated(found) == load_settings("glyphs")
    code, (found,) = lines("presets", "--check", str(preset))
    assert found["fine"] == (code == 0)
    assert {finding["what"] for finding in found["findings"]} >= {"seed model", "public set", "digits", "memory"}
    code, (found,) = lines("settings", "router")
    assert [setting["name"] for setting in found["settings"]] == [setting.name for setting in all_settings("router")]


def test_an_error_is_no_json_and_says_its_traceback_if_asked(lines, run_metamoe, capsys, monkeypatch) -> None:
    assert lines("settings", "nope") == (UnknownSettingError.exit_code, [])
    for before, debug, traceback in (([], "", False), (["--verbose"], "", True), (["--quiet"], "", False), ([], "1", True)):
        monkeypatch.setenv("METAMOE_DEBUG", debug)
        assert run_metamoe(*before, "settings", "nope") == UnknownSettingError.exit_code
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "error: no group of settings is called 'nope'" in shown.err
        assert ("Traceback" in shown.err) == traceback
    assert run_metamoe("--quiet", "--verbose", "presets") == 2


def test_what_one_call_asks_for_is_not_left_to_the_next(run_metamoe, finished: Path, capsys) -> None:
    log = logging.getLogger("metamoe")
    assert run_metamoe("--quiet", "audit", "verify", str(finished)) == 0
    assert capsys.readouterr().err == ""
    assert run_metamoe("audit", "verify", str(finished)) == 0
    assert "to verify is to have the key from its owner" in capsys.readouterr().err
    assert len(log.handlers) == 1
