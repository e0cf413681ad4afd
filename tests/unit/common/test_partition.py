"""Who has what of a domain that several clients share."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from metamoe.common.config import Data
from metamoe.common.data.datasets import load_domain, load_private, private_rows
from metamoe.common.data.partition import by_dirichlet, by_few_classes, divided
from metamoe.common.errors import EmptyPartitionError, InvalidSettingError
from metamoe.common.presets import load_settings, validated
from tests.conftest import tiny_options

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=200)


def of_labels(labels: list[int]) -> Dataset:
    return Dataset.from_dict({"label": labels})


@given(LABELS, st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 1_000))
@hypothesis_settings(max_examples=100, deadline=None)
def test_each_row_is_somebodys_once(labels: list[int], parts: int, concentration: float, number: int) -> None:
    ways = ({"kind": "iid"}, {"kind": "sizes", "sizes": [1.0] * parts}, {"kind": "pathological", "classes": 6}, {})
    for way in ways:
        data = Data(partition=way, dirichlet=concentration)
        found = divided(of_labels(labels), "x", data, parts, np.random.default_rng(number))
        assert len(found) == parts
        assert sorted(np.concatenate(found).tolist()) == list(range(len(labels)))
        assert all(np.array_equal(part, np.sort(part)) for part in found)


def test_the_partition_behind_the_published_tables_is_what_it_was() -> None:
    """Preset glyphs-skew: numbers drawn otherwise would be another federation under the same name."""
    settings = load_settings("glyphs-skew")
    domains = {name: load_domain(settings.data, name, "train") for name in settings.data.domains}
    digest = hashlib.sha256()
    for client in range(settings.clients):
        digest.update(private_rows(settings, client, domains[settings.client_domain(client)]).tobytes())
    assert digest.hexdigest() == "ee4f81e5aa6c6a16a145bb7907f08b5b3e59830bb3307b29f8b0e86814c3b87d"


def test_a_small_concentration_skews_the_classes() -> None:
    labels = np.repeat(np.arange(10), 100)

    def largest_share(concentration: float) -> float:
        parts = by_dirichlet(labels, 2, concentration, np.random.default_rng(0))
        shares = np.array([np.bincount(labels[part], minlength=10) for part in parts]) / 100
        return float(shares.max(axis=0).mean())

    assert largest_share(0.05) > 0.9
    assert largest_share(1_000) < 0.6


def test_evenly_and_by_size() -> None:
    parts = divided(of_labels([0, 1] * 500), "x", Data(partition={"kind": "iid"}), 4, np.random.default_rng(0))
    assert [len(part) for part in parts] == [250] * 4
    # Of 250 out of 500 and 500: a standard deviation of 6.9.
    assert all(90 < (part % 2).sum() < 160 for part in parts)
    data = Data(partition={"kind": "sizes", "sizes": [1, 2, 5]})
    assert [len(part) for part in divided(of_labels([0] * 80), "x", data, 3, np.random.default_rng(0))] == [10, 20, 50]
    with pytest.raises(InvalidSettingError, match=r"has 3 numbers, and 2 clients share 'x'"):
        divided(of_labels([0] * 80), "x", data, 2, np.random.default_rng(0))


def test_few_classes_each() -> None:
    labels = np.repeat(np.arange(10), 30)
    parts = by_few_classes(labels, 15, 2, np.random.default_rng(0))
    held = [set(labels[part].tolist()) for part in parts]
    assert all(len(classes) == 2 for classes in held)
    # 15 clients of 2 classes: each class has 3 holders, with 10 samples each.
    assert all(sum(label in classes for classes in held) == 3 for label in range(10))
    assert [len(part) for part in parts] == [20] * 15
    # 3 clients of 2: four classes are nobody's.
    assert len(np.unique(labels[np.concatenate(by_few_classes(labels, 3, 2, np.random.default_rng(0)))])) == 6
    data = Data(partition={"kind": "pathological"})
    with pytest.raises(InvalidSettingError, match="'x' has none"):
        divided(Dataset.from_dict({"prompt": ["a"]}), "x", data, 1, np.random.default_rng(0))


@pytest.fixture
def writers(tmp_path: Path) -> Path:
    """A table of pictures by three writers, and a file of questions from two hospitals."""
    for name in ("public", "notes"):
        (tmp_path / name).mkdir()
        for number in range(30):
            PILImage.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
        lines = [f"{i}.png,{'ab'[i % 2]},w{i % 3},{'test' if i >= 24 else 'train'}" for i in range(30)]
        (tmp_path / name / "all.csv").write_text("\n".join(["path,label,writer,split", *lines]))
    (tmp_path / "notes" / "ward").mkdir()
    (tmp_path / "plain").mkdir()
    rows = [{"instruction": f"say {i}", "output": f"it is {i}", "hospital": 7 if i % 5 else 12} for i in range(50)]
    (tmp_path / "plain" / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_every_value_of_a_column_is_a_client(writers: Path) -> None:
    natural = {"kind": "natural", "column": "writer"}
    data = {"source": "images", "folder": str(writers), "domains": ["notes"], "partition": natural}
    settings = validated({"clients": 3, "data": data})
    whole = load_domain(settings.data, "notes", "train")
    # Every tenth of what trains is for validation.
    assert len(whole) == 22
    parts = [load_private(settings, client, "train") for client in range(3)]
    assert [set(part["owner"]) for part in parts] == [{"w0"}, {"w1"}, {"w2"}]
    assert sum(map(len, parts)) == 22
    with pytest.raises(InvalidSettingError, match=r"'writer' has 3 values in 'notes'.*2 clients share it; set clients = 3$"):
        load_private(validated({"clients": 2, "data": data}), 0, "train")
    with pytest.raises(InvalidSettingError, match=r"column = 'ward' is none of 'notes': 22 of its 22 rows lack it"):
        load_private(validated({"clients": 3, "data": data | {"partition": natural | {"column": "ward"}}}), 0, "train")

    text = {"source": "text", "folder": str(writers), "domains": ["plain"], "public": "plain"}
    text |= {"partition": {"kind": "natural", "column": "hospital"}}
    parts = [load_private(validated({"clients": 2, "data": text}), client, "train") for client in range(2)]
    # In the order of their texts.
    assert [set(part["owner"]) for part in parts] == [{"12"}, {"7"}]
    assert sum(map(len, parts)) == 36


def test_what_cannot_be_is_said_of_the_settings() -> None:
    def refused(reason: str, **data: object) -> None:
        with pytest.raises(InvalidSettingError, match=reason):
            validated({"data": data})

    refused("needs data.partition.column", partition={"kind": "natural"}, source="images", folder="x")
    refused("data.source = glyphs has none", partition={"kind": "natural", "column": "font"})
    refused("needs data.partition.sizes", partition={"kind": "sizes"})
    refused("is for data.partition.kind = natural, not iid", partition={"kind": "iid", "column": "writer"})
    refused("each client has its own data", partition={"kind": "iid"}, private="own")
    settings = validated({"clients": 2_000, "data": {"domains": ["digits"], "partition": {"kind": "pathological"}}})
    with pytest.raises(EmptyPartitionError, match=r"2000 clients share 'digits' at data.partition.kind = pathological"):
        load_private(settings, 1_999, "train")


def test_who_has_what_is_shown(writers: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "who.png"
    assert run_metamoe("data", "partition", "--preset", "glyphs-skew", "--show", "--picture", str(picture)) == 0
    shown = capsys.readouterr().out
    assert "digits-1" in shown
    assert "█" in shown
    with PILImage.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 400
    few = ["--set", "data.partition.kind=pathological", "--set", "data.domains=['digits']", "--clients", "3"]
    assert run_metamoe("data", "partition", *few, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [sum(count > 0 for count in share["counts"].values()) for share in found["shares"]] == [2, 2, 2]
    given, whole = found["left-over"]["digits"]
    assert given + sum(share["samples"] for share in found["shares"]) == whole
    assert run_metamoe("data", "partition", *few, "--show") == 0
    assert f"digits: {given:,} of {whole:,} training samples are no client's" in capsys.readouterr().out
    own = ["--set", "data.source=images", "--set", "data.domains=['notes']", "--set", "data.partition.kind=natural"]
    own += ["--set", "data.partition.column=writer", "--data-dir", str(writers)]
    assert run_metamoe("data", "partition", *own, "--clients", "3") == 0
    assert "w2" in capsys.readouterr().out
    assert run_metamoe("data", "partition", *own, "--clients", "4") == 10
    assert "set clients = 3" in capsys.readouterr().err
    assert run_metamoe("data", "partition", "--picture", str(tmp_path / "who.gif")) != 0
    assert "has to end in .png, .svg, .pdf" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_which_each_writer_is_a_client(
    writers: Path, seed_folder: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    way = {"data.domains": '["notes"]', "data.partition.kind": "natural", "data.partition.column": "writer"}
    options = tiny_options(**{"seed-model": seed_folder, "clients": 3, **way})
    out = tmp_path / "out"
    assert run_metamoe("simulate", "--data-dir", str(writers), "--backend", "local", "--out", str(out), *options) == 0
    capsys.readouterr()
    assert {"notes-1", "notes-2", "notes-3"} <= {entry.name for entry in (out / "clients").iterdir()}
    assert (out / "results.json").is_file()
