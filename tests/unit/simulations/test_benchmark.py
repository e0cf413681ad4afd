"""The benchmark: methods as data, and a table that is not worked out twice."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from metamoe.common.compute import Place
from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError, MetaMoEError
from metamoe.common.model import moe
from metamoe.common.presets import changed, load_settings, to_toml
from metamoe.simulations import evaluate
from metamoe.simulations.benchmark import models
from metamoe.simulations.benchmark import run as benchmark
from metamoe.simulations.benchmark.methods import Use, ablations, chosen, main_methods
from metamoe.simulations.benchmark.models import training_key
from metamoe.simulations.benchmark.run import Plan
from metamoe.simulations.benchmark.tables import REFERENCE, markdown, read_results


@pytest.fixture
def preset(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.toml"
    file.write_text(to_toml(small))
    return file


def test_every_method_and_ablation_is_a_valid_change_of_every_preset() -> None:
    for preset in ("glyphs", "glyphs-skew", "glyphs-overlap", "glyphs-corrupted"):
        methods = [*main_methods(load_settings(preset)), *ablations(load_settings(preset))]
        assert len({method.name for method in methods}) == len(methods)
        settings = [load_settings(preset, method.settings) for method in methods]
        # An ablation changes something, and no two are the same.
        switched = [s for s, method in zip(settings, methods, strict=True) if method.group and method.use == "unified"]
        assert load_settings(preset) not in switched
        assert len({s.model_dump_json() for s in switched}) == len(switched)


def test_an_ablation_that_changes_nothing_is_left_out() -> None:
    by_preset = {name: [method.name for method in ablations(load_settings(name))] for name in ("glyphs", "glyphs-skew")}
    # Three clients have three experts as it is, nine have not.
    assert [("experts: at most 3" in names) for names in by_preset.values()] == [False, True]
    assert [("top-k: top-3" in names) for names in by_preset.values()] == [True, False]


def test_only_the_pooled_method_is_marked_as_not_private() -> None:
    methods = main_methods(load_settings("glyphs"))
    assert [method.name for method in methods if not method.private] == ["unrestricted-moe"]


def test_baselines_are_set_up_as_they_are_defined() -> None:
    by_name = {method.name: method for method in main_methods(load_settings("glyphs"))}
    flexolmo = load_settings("glyphs", by_name["flexolmo"].settings)
    assert (flexolmo.expert_training.samples, flexolmo.router.vectors) == ("private", "private")
    assert flexolmo.proxies.selection == "relevance"
    paper = load_settings("glyphs", by_name["metamoe-paper"].settings)
    assert (paper.router.top_k, paper.router.renormalise, paper.router_training.supervision) == (1, False, "task")
    assert load_settings("glyphs", by_name["metamoe-released"].settings).router_training.train_router is False


def test_a_change_of_a_baseline_changes_nothing_else() -> None:
    settings = load_settings("glyphs")
    flexolmo = next(method for method in main_methods(settings) if method.name == "flexolmo")
    with_seed = next(m for m in ablations(settings) if m.name == "baselines: flexolmo with the seed as expert")
    switched = load_settings("glyphs", with_seed.settings)
    assert switched.router.seed_expert
    assert changed(switched, ["router.seed-expert=false"]) == load_settings("glyphs", flexolmo.settings)


def test_names_that_do_not_exist_are_listed() -> None:
    settings = load_settings("glyphs")
    with pytest.raises(InvalidSettingError, match=r"unknown method 'best'; there are all, zero-shot, expert:digits"):
        chosen(settings, ["best"], [])
    with pytest.raises(InvalidSettingError, match=r"unknown ablation 'size'; there are all, proxies"):
        chosen(settings, [], ["size"])
    assert len(chosen(settings, ["metamoe", "btm"], ["rows"])) == 4
    assert len(chosen(settings, ["all"], ["all"])) == len(main_methods(settings)) + len(ablations(settings))


def test_outcomes_are_kept_by_what_decides_them(small: Settings, tmp_path: Path) -> None:
    methods = {method.name: method for method in main_methods(small)}
    plan = Plan(small, tuple(methods.values()), (0, 1), tmp_path / "out")
    files = [plan.file(method, seed) for method in methods.values() for seed in plan.seeds]
    assert len(set(files)) == len(files)
    other = Plan(changed(small, ["lora.rank=4"]), plan.methods, plan.seeds, plan.out)
    assert other.file(methods["btm"], 0) != plan.file(methods["btm"], 0)
    # What a model is evaluated on is part of an outcome, and of no training.
    blurred = Plan(changed(small, ["data.test-corruptions=['blur']"]), plan.methods, plan.seeds, plan.out)
    assert blurred.file(methods["btm"], 0) != plan.file(methods["btm"], 0)
    assert training_key(blurred.settings(None, 0)) == training_key(plan.settings(None, 0))


@pytest.mark.slow
def test_a_benchmark_of_every_kind_of_method(preset: Path, tmp_path: Path, run_metamoe, capsys) -> None:
    """Small, in this process but for the pool: the numbers fit together, and a second call works out nothing."""
    out = tmp_path / "out"
    arguments = ("benchmark", "--preset", str(preset), "--seeds", "2", "--out", str(out))
    methods = "zero-shot,expert:greek,oracle,btm,soup,flexolmo,fedavg,unrestricted-moe,metamoe"
    assert run_metamoe(*arguments, "--methods", methods, "--ablation", "rows,embedding") == 0
    results = read_results(out)
    assert list(results.methods) == methods.split(",")
    assert list(results.ablations) == [
        "rows: dot products",
        "rows: fresh",
        "embedding: mixed in layers",
        "embedding: answers mixed",
    ]
    assert results.seeds == [0, 1]
    for record in [*results.methods.values(), *results.ablations.values()]:
        assert set(record.domains) == {"digits", "greek", "arrows"}
        for seed in range(2):
            assert record.average[seed] == pytest.approx(sum(v[seed] for v in record.domains.values()) / 3, abs=1e-3)
    metamoe, expert = results.methods[REFERENCE], results.methods["expert:greek"]
    # The oracle's greek is the greek expert's; its public accuracy is the seed's.
    assert results.methods["oracle"].domains["greek"] == expert.domains["greek"]
    assert results.methods["oracle"].public == results.methods["zero-shot"].public
    # LoRA in float16 on one layer; the vectors [2, 16] and [16] in float32; a shape of 32 dimensions in float16; the client's
    # number.
    assert metamoe.bytes_up == [192 * 2 + 4 * 32 + 4 * 16 + 2 * (32 * 33 // 2) + 8] * 2
    # One round, in float16, and the number of samples.
    assert results.methods["fedavg"].bytes_up == [192 * 2 + 8] * 2
    assert results.methods["zero-shot"].bytes_up == [0, 0]
    # 40 images of 32 x 32 and their labels.
    assert results.methods["unrestricted-moe"].bytes_up == [40 * (1_024 + 8)] * 2
    assert metamoe.expert_names == ["digits", "greek", "arrows", "seed"]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for rows in metamoe.routing[0].values() for row in rows)
    assert set(results.sent) == {"digits", "greek", "arrows"}
    assert sum(array.bytes for array in results.sent["greek"]) == metamoe.bytes_up[0]
    assert set(json.loads((out / "projection.json").read_text())["clients"]["arrows"]) == {
        "private",
        "random",
        "relevance",
        "dpp",
    }
    assert markdown(results) == (out / "tables.md").read_text()
    assert "unrestricted-moe (pools private data)" in (out / "tables.md").read_text()
    assert (out / "report.html").is_file()
    assert "unrestricted-moe" in capsys.readouterr().out

    outcomes = {file: file.stat().st_mtime_ns for file in (out / "outcomes").iterdir()}
    assert run_metamoe(*arguments, "--methods", "metamoe", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {**json.loads((out / "results.json").read_text()), "folder": str(out)}
    assert {file: file.stat().st_mtime_ns for file in (out / "outcomes").iterdir()} == outcomes
    # What was done earlier is shown too.
    assert read_results(out).methods == results.methods


@pytest.mark.slow
def test_the_same_part_done_twice_is_the_same(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = next(method for method in main_methods(small) if method.name == REFERENCE)
    found = []
    for name in ("a", "b"):
        # The second in a cache of its own.
        monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache" / name))
        plan = Plan(small, (method,), (0,), tmp_path / name)
        benchmark.run_part(plan, method, 0)
        found.append(json.loads(plan.file(method, 0).read_text()))
        for time_of in ("seconds", "unify_seconds", "inference_ms"):
            del found[-1][time_of]
    assert found[0] == found[1]


def test_a_folder_with_something_else_in_it_is_refused(preset: Path, tmp_path: Path, run_metamoe, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("{}")
    arguments = ("benchmark", "--preset", str(preset), "--methods", "zero-shot")
    assert run_metamoe(*arguments, "--out", str(tmp_path / "mine")) == InvalidSettingError.exit_code
    assert run_metamoe(*arguments, "--set", "seed=3", "--out", str(tmp_path / "new")) == InvalidSettingError.exit_code
    assert "--seeds" in capsys.readouterr().err
    assert (tmp_path / "mine" / "results.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--set", "clients=1", "--ablation", "top-k"), "router.top-k = 3 is more than the 2 experts"),
        (("--set", "experts.max=2", "--methods", "unrestricted-moe"), "unrestricted-moe needs an expert for every client"),
        (("--set", "without=['greek']", "--methods", "zero-shot"), "without = ['greek'] is for a run"),
        # How large the public set is only the data say.
        (("--ablation", "sizes"), "proxies.pool = 500 is not less than the 300 samples"),
    ],
)
def test_a_method_that_a_preset_does_not_allow_is_refused_before_anything_runs(
    preset: Path, tmp_path: Path, run_metamoe, capsys, changes: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(MetaMoEError):
        load_settings(str(preset), ["proxies.count=400"])
    assert run_metamoe("benchmark", "--preset", str(preset), *changes, "--out", str(out)) != 0
    assert said in capsys.readouterr().err
    assert not (out / "outcomes").exists()


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_without_doing_work_twice(preset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from metamoe.cli import main; main()", "benchmark", "--preset", str(preset)]
    command += ["--methods", "zero-shot,btm,flexolmo,metamoe", "--seeds", "2", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list((out / "outcomes").glob("*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    def state(folder: Path, pattern: str) -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in folder.glob(pattern)}

    # Where clients keep what they trained; the server's copy of a run that was cut short is written anew.
    clients, trained = tmp_path / "cache" / "benchmark" / "clients", "*/experts/*/adapter_model.safetensors"
    outcomes, experts = state(out / "outcomes", "*.json"), state(clients, trained)
    assert outcomes
    assert experts
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert outcomes.items() <= state(out / "outcomes", "*.json").items()
    assert experts.items() <= state(clients, trained).items()
    assert list(read_results(out).methods) == ["zero-shot", "btm", "flexolmo", "metamoe"]


@pytest.mark.slow
def test_every_method_is_asked_on_the_servers_device(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's meta device for a GPU: what was left on the CPU would not go with it."""
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    settings = changed(small, ["data.test-samples=8", "compute.server-threads=1"])
    batch = evaluate.test_sets(settings.seed_model, Place(torch.device("cpu")), settings.data)[0].samples.asked(torch.arange(4))
    uses = {method.use: method for method in [*main_methods(settings), *ablations(settings)]}
    # All of one run, whose stages are computed here.
    here = {use: models.build(replace(method, settings=()), settings) for use, method in uses.items()}
    monkeypatch.setattr(models, "place_of", lambda *_: Place(torch.device("meta")))
    # The tiny layer is so narrow that masking three experts is a large part of it, and grouping cannot be done there.
    monkeypatch.setattr(moe, "_MASKING", 10.0)
    for use, method in uses.items():
        elsewhere = models.build(replace(method, settings=()), settings)
        assert elsewhere.scores.keys() == here[use].scores.keys()
        for domain, scores in elsewhere.scores.items():
            with torch.inference_mode():
                assert (here[use].scores[domain](batch).device.type, scores(batch).device.type) == ("cpu", "meta")
    assert set(uses) == set(get_args(Use))
