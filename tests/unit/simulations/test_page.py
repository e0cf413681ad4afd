"""The page of a run, and the curves on it."""

import re
import shutil
from pathlib import Path

import pytest

from metamoe.common.config import Settings
from metamoe.common.events import read_events
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import changed, to_toml
from metamoe.simulations.local import run_local
from metamoe.simulations.results import write_results

VALIDATION = {"validation-loss", "validation-accuracy"}


@pytest.fixture(scope="module")
def watched(seed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """A run that looks at validation samples on the way, and its results."""
    from tests.conftest import small_run

    settings = changed(
        small_run(seed_folder), ["expert-training.epochs=3", "expert-training.evaluate-every=2", "report-accuracy=true"]
    )
    out = tmp_path_factory.mktemp("watched") / "run"
    run_local(settings, out)
    write_results(settings, out, lambda _done, _total: None)
    (out / "settings.toml").write_text(to_toml(settings))
    return settings, out


def test_a_client_writes_its_curve_on_its_own_disk_alone(watched: tuple[Settings, Path]) -> None:
    settings, out = watched
    for name in settings.client_names:
        events = [event for event, _ in read_events(out / "clients" / name / "events.jsonl")]
        assert [event.done for event in events] == [0, 1, 2, 3]
        assert [set(event.metrics) >= VALIDATION for event in events] == [False, False, True, True]
        assert [{"loss", "learning-rate"} <= set(event.metrics) for event in events] == [False, True, True, True]
        # Four steps an epoch of 40 samples and 20 proxies; the fourth of twelve has nine twelfths of the rate left.
        assert events[1].metrics["learning-rate"] == pytest.approx(1e-3 * 9 / 12)
        assert 0 <= events[2].metrics["validation-accuracy"] <= 100
    measured = [event for event, _ in read_events(out / "events.jsonl") if event.metrics]
    assert {event.stage for event in measured} == {"unify"}
    assert all("validation-loss" not in event.metrics for event in measured)


@pytest.mark.slow
def test_looking_on_the_way_changes_no_expert(watched: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, out = watched
    run_local(changed(settings, ["expert-training.evaluate-every=0"]), tmp_path)
    for name in settings.client_names:
        experts = [folder / "server" / "experts" / name / "adapter_model.safetensors" for folder in (out, tmp_path)]
        assert experts[0].read_bytes() == experts[1].read_bytes()


def test_the_page_has_all_that_the_run_left(watched: tuple[Settings, Path], run_metamoe) -> None:
    _, out = watched
    assert run_metamoe("report", str(out)) == 0
    page = (out / "report.html").read_text()
    assert load_model(out / "model").manifest.model_hash in page
    headings = ["Accuracy", "Training", "Where tokens go", "Proxies", "What each client sent", "Time and memory"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    # Curves of experts and router, the routing, and of three clients their own samples and proxies.
    assert page.count("<img ") == 2 + 1 + 6
    assert page.count("its own samples") == 6
    assert all(alt for alt in re.findall('<img [^>]*alt="(.*?)"', page))
    assert not re.search(r"<script|src=\"http|href=\"http", page)


def test_a_deployed_runs_page_has_nothing_of_the_clients(watched: tuple[Settings, Path], tmp_path: Path, run_metamoe) -> None:
    _, out = watched
    deployed = tmp_path / "run"
    shutil.copytree(out, deployed)
    shutil.rmtree(deployed / "clients")
    (deployed / "results.json").unlink()
    (deployed / "report.html").unlink(missing_ok=True)
    assert run_metamoe("report", str(deployed)) == 0
    page = (deployed / "report.html").read_text()
    assert "its own samples" not in page
    assert page.count("its proxies") > 0
    assert "accuracy on its own data" in page


def test_a_run_that_has_not_ended_has_no_page(watched: tuple[Settings, Path], tmp_path: Path, run_metamoe, capsys) -> None:
    shutil.copytree(watched[1], tmp_path / "run")
    (tmp_path / "run" / "server" / "summary.json").unlink()
    assert run_metamoe("report", str(tmp_path / "run")) != 0
    assert "has come to its end" in capsys.readouterr().err


@pytest.mark.slow
def test_early_stopping_gives_another_expert_and_the_same_twice(small: Settings, tmp_path: Path) -> None:
    steep = ["expert-training.epochs=6", "expert-training.learning-rate=1", "expert-training.evaluate-every=1"]
    experts = []
    for name, patience in [("a", 1), ("b", 1), ("never", 0)]:
        run_local(changed(small, [*steep, f"expert-training.patience={patience}"]), tmp_path / name)
        folders = (tmp_path / name / "server" / "experts").iterdir()
        experts.append({folder.name: (folder / "adapter_model.safetensors").read_bytes() for folder in folders})
    assert experts[0] == experts[1]
    assert experts[0] != experts[2]
