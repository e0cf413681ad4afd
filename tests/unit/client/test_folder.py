"""A client's own data: read as it is, checked, kept out of the app, and the same as built-in data where it shows the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamoe.client import folder as client_folder
from metamoe.client.answer import answer
from metamoe.client.app import respond
from metamoe.client.folder import check_folder, read_folder
from metamoe.client.site import Site, site_of
from metamoe.common.config import Data, Settings
from metamoe.common.data.datasets import load_private, public_fingerprint
from metamoe.common.data.survey import survey
from metamoe.common.errors import InvalidSettingError, PrivateDataError
from metamoe.common.model.artifact import load_model
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from metamoe.common.wire import Kind, Request
from metamoe.server.stages import run_stages
from metamoe.simulations.prepare import prepare

DATA = Data(source="images", private="own", folder="unused")
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
    data = read_folder(folder, "train", DATA)
    assert data.features["label"].names == ["DIGIT ONE", "DIGIT TWO"]
    assert data["label"] == [0, 0, 0, 1, 1, 1]
    assert [np.asarray(image)[0, 0].tolist() for image in data["image"]] == [[v] * 3 for v in (200, 201, 202, 100, 101, 102)]


def test_a_check_counts_and_names_what_cannot_be_read(folder: Path) -> None:
    (folder / "train" / "DIGIT ONE" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    (folder / "train" / "DIGIT ONE" / "notes.txt").write_text("no image, and not taken for one")
    report = check_folder(folder, DATA)
    assert report.counts == {"train": {"DIGIT ONE": 3, "DIGIT TWO": 3}, "test": {"DIGIT ONE": 2, "DIGIT TWO": 2}}
    assert len(report.wrong) == 1
    assert "broken.png cannot be read as an image" in report.wrong[0]
    with pytest.raises(PrivateDataError, match=r"broken\.png cannot be read as an image"):
        read_folder(folder, "train", DATA)


def test_pictures_are_looked_at_once_until_one_changes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    looks = []
    monkeypatch.setattr(client_folder, "survey", lambda *given: looks.append(1) or survey(*given))
    for _ in range(2):
        assert len(read_folder(folder, "train", DATA)) == 6
    assert len(looks) == 1
    broken = folder / "train" / "DIGIT ONE" / "99.png"
    broken.write_bytes(b"x")
    # What cannot be read is never kept as looked at.
    for _ in range(2):
        with pytest.raises(PrivateDataError, match=r"1 of 7 cannot be read"):
            read_folder(folder, "train", DATA)
    assert len(looks) == 3


def test_data_inside_a_flower_app_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.flwr.app]\npublisher = "x"\n')
    for refused in (lambda: read_folder(folder, "train", DATA), lambda: check_folder(folder, DATA)):
        with pytest.raises(PrivateDataError, match="packed into the app bundle"):
            refused()
    # Another kind of project sends nothing.
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\n")
    assert len(read_folder(folder, "train", DATA)) == 6


def test_what_is_no_data_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivateDataError, match="not a folder"):
        read_folder(tmp_path / "none", "train", DATA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrivateDataError, match="has no folder for a class"):
        read_folder(tmp_path / "empty", "train", DATA)
    with pytest.raises(PrivateDataError, match="has no images"):
        read_folder(folder, "validation", DATA)
    write(folder, "test", "DIGIT NINE", 1)
    with pytest.raises(PrivateDataError, match="'DIGIT NINE', which"):
        check_folder(folder, DATA)


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
    assert "239,114" in shown
    write(folder, "train", "PATIENT 4711", 2)
    assert run_metamoe("client", "check", str(folder), *own) == 1
    assert "class 'PATIENT 4711' is neither in data.classes nor public" in capsys.readouterr().out


def test_a_check_says_what_is_unusual_and_shows_what_the_model_sees(folder: Path, tmp_path: Path, run_metamoe, capsys) -> None:
    (folder / "train" / "DIGIT ONE" / ".DS_Store").write_bytes(b"x")
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(folder / "train" / "DIGIT ONE" / "clear.png")
    Image.open(folder / "train" / "DIGIT ONE" / "0.png").save(folder / "train" / "DIGIT TWO" / "again.bmp")
    sheet = tmp_path / "sheet.png"
    arguments = ("client", "check", str(folder), "--set", "data.private=own", "--sheet", str(sheet))
    assert run_metamoe(*arguments, "--json") == 0
    unusual = json.loads(capsys.readouterr().out)["unusual"]
    assert unusual["transparent in places"] == [str(folder / "train" / "DIGIT ONE" / "clear.png")]
    assert unusual["ignored, of the system"] == [str(folder / "train" / "DIGIT ONE" / ".DS_Store")]
    assert len(unusual["the same picture in two classes"]) == 1
    with Image.open(sheet) as shown:
        pixels = np.asarray(shown)
    # Three of each class and three that are unusual, of which the one that is clear is white, in a row of eight.
    assert shown.size[1] < 200
    assert (pixels[20:120, :1200] == 255).all(axis=(0, 2)).any()
    assert run_metamoe(*arguments) == 0
    assert "1 transparent in places: " in capsys.readouterr().out
    refused = run_metamoe("client", "check", str(folder), "--set", "data.source=questions", "--sheet", str(sheet))
    assert refused == InvalidSettingError.exit_code


def test_a_preset_is_checked_with_what_is_unusual_in_its_folders(tmp_path: Path, run_metamoe, capsys) -> None:
    for name in ("east", "all"):
        for split in ("train", "test"):
            write(tmp_path / name, split, "DIGIT ONE", 3, 100)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "east" / "train" / "DIGIT ONE" / "clear.png")
    (tmp_path / "all" / "test" / "DIGIT ONE" / "broken.png").write_bytes(b"no picture")
    chosen = ["data.source=images", 'data.domains=["east"]', "data.public=all", "clients=1"]
    options = [word for setting in chosen for word in ("--set", setting)]
    assert run_metamoe("presets", "--check", "glyphs", "--data-dir", str(tmp_path), *options) == 1
    shown = capsys.readouterr().out
    assert "east: 1 transparent in places: " in shown
    assert "broken.png cannot be read as an image" in shown


def test_three_organisations_with_pictures_of_different_kinds(small: Settings, tmp_path: Path, run_metamoe, capsys) -> None:
    """One has its pictures from telephones, one from a scanner with 16 bits, one in a table; all are digits to the seed."""
    rows = load_private(small, 0, "train")
    chosen = {"train": rows.select(range(24)), "test": rows.select(range(24, 36))}
    names = rows.features["label"].names
    turned = Image.Exif()
    turned[274] = 6
    for part, samples in chosen.items():
        lines = ["scan,digit"]
        for number, row in enumerate(samples):
            name, grey = names[row["label"]], row["image"].convert("L")
            for owner in ("telephones", "scanner"):
                (tmp_path / owner / part / name).mkdir(parents=True, exist_ok=True)
            on_its_side = grey.transpose(Image.Transpose.ROTATE_90)
            on_its_side.save(tmp_path / "telephones" / part / name / f"{number}.png", exif=turned)
            sixteen = np.asarray(grey).astype(np.uint16) * 257
            Image.fromarray(sixteen).save(tmp_path / "scanner" / part / name / f"{number}.tiff")
            (tmp_path / "table" / "scans").mkdir(parents=True, exist_ok=True)
            grey.save(tmp_path / "table" / "scans" / f"{part}{number}.png")
            lines.append(f"scans/{part}{number}.png,{name}")
        (tmp_path / "table" / f"{part}.csv").write_text("\n".join(lines))
    owners = ["telephones", "scanner", "table"]
    columns = ["data.image-column=scan", "data.label-column=digit"]
    settings = changed(small, ["data.private=own", f"data.domains={json.dumps(owners)}", "clients=3", *columns])

    unusual = {}
    for owner in owners:
        options = [word for setting in ("data.private=own", *columns) for word in ("--set", setting)]
        assert run_metamoe("client", "check", str(tmp_path / owner), *options, "--json") == 0
        unusual[owner] = json.loads(capsys.readouterr().out)["unusual"]
    assert len(unusual["telephones"]["turned as EXIF says"]) == 36
    assert len(unusual["scanner"]["with 16 bits"]) == 36
    assert unusual["table"] == {}
    # The same pictures, whatever they came as.
    pixels = [[np.asarray(i) for i in read_folder(tmp_path / owner, "train", settings.data)["image"]] for owner in owners[:2]]
    assert all(np.array_equal(*pair) for pair in zip(*pixels, strict=True))

    def answers(kind, requests):
        for client, content in requests.items():
            yield client, respond(kind, content, Site(client, tmp_path / "state", tmp_path / owners[client]))

    run_stages(settings, range(3), answers, tmp_path / "out")
    told = {owner: json.loads((tmp_path / "state" / owner / "accuracy.json").read_text()) for owner in owners}
    assert told["telephones"]["metrics"] == told["scanner"]["metrics"]
    assert told["table"]["metrics"]["count"] == 12
    model, test = str(tmp_path / "out" / "model"), tmp_path / "scanner" / "test"
    assert run_metamoe("evaluate", model, "--data", str(test), "--json") == 0
    assert json.loads(capsys.readouterr().out)["count"] == 12
