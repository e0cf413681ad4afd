"""Runs at the trackers that people have: the real libraries, on this machine alone, and what they kept read back."""

import shutil
from pathlib import Path

import pytest

from metamoe import tracking
from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.events import EventLog, read_events
from metamoe.common.files import read_json, write_atomically
from metamoe.common.presets import to_toml
from metamoe.simulation import resume_simulation
from metamoe.tracking import Service, Tracking, check_services, tracked
from metamoe.tracking.outcome import track_folder


@pytest.fixture(scope="module")
def told(finished: Path, tmp_path_factory: pytest.TempPathFactory, seed_folder: Path) -> Path:
    """A run that was resumed for its table alone, with all three told of it."""
    from tests.conftest import small_run

    run = tmp_path_factory.mktemp("told") / "small"
    shutil.copytree(finished, run)
    write_atomically(run / "settings.toml", to_toml(small_run(seed_folder)))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
            patch.delenv(variable, raising=False)
        resume_simulation(run, track=list(Service))
    return run


def loss_of(run: Path) -> float:
    """What a client wrote down of its last epoch."""
    *_, (event, _) = read_events(run / "clients" / "greek" / "events.jsonl")
    return event.metrics["loss"]


@pytest.mark.slow
def test_tensorboard_has_curves_settings_tables_and_pictures(told: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(told / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    tags = found.Tags()
    assert [round(point.value, 4) for point in found.Scalars("greek/loss")] == [round(loss_of(told), 4)]
    assert {"digits/learning-rate", "router/loss", "seconds/expert", "accuracy/metamoe/average"} <= set(tags["scalars"])
    assert {"routing", "proxies/greek"} <= set(tags["images"])
    texts = {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in tags["tensors"]}
    assert read_json(told / "results.json")["model"] in texts["model/text_summary"]
    assert "| expert-training.batch-size | 16 |" in texts["settings/text_summary"]
    assert "| metamoe |" in texts["accuracy/text_summary"]


@pytest.mark.slow
def test_mlflow_has_curves_settings_tables_and_pictures(told: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{told / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("metamoe").experiment_id])
    assert (run.info.run_name, run.info.status) == ("small", "FINISHED")
    assert run.data.params["proxies.count"] == "20"
    assert run.data.tags["model"] == read_json(told / "results.json")["model"]
    (point,) = client.get_metric_history(run.info.run_id, "greek/loss")
    assert (point.value, point.step) == (loss_of(told), 1)
    assert run.data.metrics["accuracy/zero-shot/digits"] == read_json(told / "results.json")["accuracy"]["zero-shot"]["digits"]
    assert {"accuracy.md", "routing.png", "proxies", "report.html"} <= {a.path for a in client.list_artifacts(run.info.run_id)}


@pytest.mark.slow
def test_wandb_has_them_offline(told: Path) -> None:
    (kept,) = (told / "wandb").glob("offline-run-*/*.wandb")
    content = kept.read_bytes()
    for part in (b"greek/loss", b"router/learning-rate", b"proxies.count", read_json(told / "results.json")["model"].encode()):
        assert part in content
    media = {file.suffix for file in kept.parent.rglob("media/**/*") if file.is_file()}
    assert {".png", ".html", ".json"} <= media


@pytest.mark.slow
def test_told_again_it_is_the_same_run_with_the_same_points(told: Path) -> None:
    from mlflow import MlflowClient

    before = read_json(told / "tracking.json")
    assert track_folder(told, [Service.mlflow]) == {Service.mlflow: before["mlflow"]}
    client = MlflowClient(f"sqlite:///{told / 'mlflow.db'}")
    assert len(client.search_runs([client.get_experiment_by_name("metamoe").experiment_id])) == 1
    assert len(client.get_metric_history(before["mlflow"], "greek/loss")) == 1
    assert client.get_run(before["mlflow"]).info.status == "FINISHED"


def test_a_party_tracks_what_lies_on_its_own_disk(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    EventLog(tmp_path / "state" / "client-0" / "events.jsonl")("expert", 1, 2, "client-0", {"loss": 0.5})
    track_folder(tmp_path, [Service.tensorboard])
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in found.Scalars("client-0/loss")] == [(1, 0.5)]


def test_a_folder_without_training_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"holds no events\.jsonl"):
        track_folder(tmp_path, [Service.tensorboard])


def test_a_library_that_is_not_installed_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="wandb")

    monkeypatch.setattr(tracking, "import_module", missing)
    with pytest.raises(InvalidSettingError, match=r"--track wandb needs the package wandb.*metamoe-fl\[wandb\]"):
        check_services([Service.wandb])


def test_a_server_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Settings) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InvalidSettingError, match=r"--track mlflow: .*127"), tracked([Service.mlflow], tmp_path, small):
        pass


def test_a_service_that_fails_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        id = "some"
        asked = 0

        def number(self, *_point: object) -> None:
            self.asked += 1
            raise OSError("no space left on device")

        def close(self) -> None:
            raise AssertionError("asked again")

    from metamoe.common.events import Event

    service = Failing()
    follower = Tracking(Service.tensorboard, service, (OSError,))
    for epoch in (1, 2):
        follower.show(Event("expert", epoch, 2, "greek", 0.0, {"loss": 1.0, "learning-rate": 0.1}), own=True)
    follower.close()
    assert service.asked == 1
    assert "tensorboard is told no more of this run: no space left on device" in caplog.text
