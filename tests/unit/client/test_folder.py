"""A client's own data: read as it is, checked, kept out of the app, and the same as built-in data where it shows the same."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamoe.client.answer import answer
from metamoe.client.app import respond
from metamoe.client.folder import check_folder, read_folder
from metamoe.client.site import Site, site_of
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private, public_fingerprint
from metamoe.common.errors import InvalidSettingError, PrivateDataError
from metamoe.common.model.artifact import load_model
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from metamoe.common.wire import Kind, Request
from metamoe.server.stages import run_stages
from metamoe.simulations.prepare import prepare

OWN = ("data.private=own", 'data.domains=["east", "west"]', "clients=2")


def write(folder: Path, split: str, name: str, count: int, grey: int = 0) -> None:
    (folder / split / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("L", (32, 32), grey + i).save(folder / split / name / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    for split, count in (("train", 3), ("test", 2)):
        write(data, split, "DIGIT TWO", count, 100)
        write(data, split, "DIGIT ONE", count, 200)
    return data


def test_classes_are_the_folders_in_order_and_images_are_rgb(folder: Path) -> None:
    data = read_folder(folder, "train")
    assert data.features["label"].names == ["DIGIT ONE", "DIGIT TWO"]
    assert data["label"] == [0, 0, 0, 1, 1, 1]
    assert [np.asarray(image)[0, 0].tolist() for image in data["image"]] == [[v] * 3 for v in (200, 201, 202, 100, 101, 102)]


def test_a_check_counts_and_names_what_cannot_be_read(folder: Path) -> None:
    (folder / "train" / "DIGIT ONE" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    (folder / "train" / "DIGIT ONE" / "notes.txt").write_text("no image, and not taken for one")
    report = check_folder(folder)
    assert report.counts == {"train": {"DIGIT ONE": 3, "DIGIT TWO": 3}, "test": {"DIGIT ONE": 2, "DIGIT TWO": 2}}
    assert len(report.wrong) == 1
    assert "broken.png is not an image" in report.wrong[0]
    with pytest.raises(PrivateDataError, match=r"broken\.png is not an image"):
        read_folder(folder, "train")


def test_data_inside_a_flower_app_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.flwr.app]\npublisher = "x"\n')
    for refused in (lambda: read_folder(folder, "train"), lambda: check_folder(folder)):
        with pytest.raises(PrivateDataError, match="packed into the app bundle"):
            refused()
    # Another kind of project sends nothing.
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\n")
    assert len(read_folder(folder, "train")) == 6


def test_what_is_no_data_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivateDataError, match="not a folder"):
        read_folder(tmp_path / "none", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrivateDataError, match="has no folder for a class"):
        read_folder(tmp_path / "empty", "train")
    with pytest.raises(PrivateDataError, match="has no images"):
        read_folder(folder, "validation")
    write(folder, "test", "DIGIT NINE", 1)
    with pytest.raises(PrivateDataError, match="'DIGIT NINE', which"):
        check_folder(folder)


def ask(kind: Kind, settings: Settings, site: Site) -> dict[str, np.ndarray]:
    request = Request(settings, load_seed(settings.seed_model).fingerprint, public_fingerprint(settings.data), {})
    return answer(kind, request, site)


def test_settings_and_site_agree_on_whose_data_it_is(small: Settings, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivateDataError, match="built-in data, but this client has its own"):
        ask("profile", small, Site(0, tmp_path / "state", folder))
    with pytest.raises(PrivateDataError, match="no data-dir in its node config, or it is empty"):
        ask("profile", changed(small, OWN), Site(0, tmp_path / "state"))
    with pytest.raises(InvalidSettingError, match="metamoe deploy run"):
        prepare(changed(small, OWN), on_ray=True)
    site = site_of({"partition-id": 1, "state-dir": "/state", "data-dir": str(folder)}, {})
    assert site == Site(1, Path("/state"), folder, simulation=False)
    # Mounted, and nothing in it.
    (tmp_path / "empty").mkdir()
    assert site_of({"partition-id": 1, "state-dir": "/state", "data-dir": str(tmp_path / "empty")}, {}).data is None


def test_a_class_name_that_was_not_agreed_on_stays(small: Settings, folder: Path, tmp_path: Path) -> None:
    write(folder, "train", "PATIENT 4711", 2)
    settings = changed(small, OWN)
    with pytest.raises(PrivateDataError, match="'PATIENT 4711'"):
        ask("profile", settings, Site(0, tmp_path / "state", folder))
    agreed = changed(settings, ['data.classes=["PATIENT 4711"]'])
    assert ask("profile", agreed, Site(0, tmp_path / "state", folder))["client"] == 0


def test_the_same_images_say_the_same_from_a_folder(small: Settings, tmp_path: Path) -> None:
    built_in = load_private(small, 0, "train")
    names = built_in.features["label"].names
    for i, (image, label) in enumerate(zip(built_in["image"], built_in["label"], strict=True)):
        (tmp_path / "data" / "train" / names[label]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / "train" / names[label] / f"{i}.png")
    expected = ask("profile", small, Site(0, tmp_path / "state"))
    own = ask("profile", changed(small, OWN), Site(0, tmp_path / "state", tmp_path / "data"))
    assert expected.keys() == own.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(own[name], array, rtol=1e-5, atol=1e-6)


def test_a_whole_run_on_the_clients_own_data(small: Settings, folder: Path, tmp_path: Path) -> None:
    settings = changed(small, [*OWN, 'data.classes=["a class of ours"]', "report-accuracy=true"])
    write(tmp_path / "west", "train", "a class of ours", 3, 50)
    write(tmp_path / "west", "test", "a class of ours", 1, 50)
    data = [folder, tmp_path / "west"]

    def answers(kind, requests):
        for client, content in requests.items():
            yield client, respond(kind, content, Site(client, tmp_path / "state", data[client]))

    run_stages(settings, range(2), answers, tmp_path / "out")
    manifest = load_model(tmp_path / "out" / "model").manifest
    assert manifest.experts == ["east", "west"]
    assert "a class of ours" in manifest.classes
    assert (tmp_path / "state" / "west" / "accuracy.json").is_file()


def test_the_command_says_what_is_there_and_what_would_be_sent(
    folder: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--set", "data.private=own"]
    assert run_metamoe("client", "check", str(folder), *own) == 0
    shown = capsys.readouterr().out
    assert "DIGIT TWO" in shown
    assert "206,344" in shown
    write(folder, "train", "PATIENT 4711", 2)
    assert run_metamoe("client", "check", str(folder), *own) == 1
    assert "class 'PATIENT 4711' is neither in data.classes nor public" in capsys.readouterr().out
