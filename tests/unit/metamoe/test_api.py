"""What a notebook sees: ``import metamoe`` and nothing else of ours."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import metamoe
from metamoe import progress
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_domain
from metamoe.common.data.pixels import pixel_values
from metamoe.common.errors import (
    InputFileError,
    InvalidSettingError,
    MetaMoEError,
    ModelFileError,
    PresetNotFoundError,
    ProxyCountError,
    RunFailedError,
    UnknownSettingError,
)
from metamoe.common.model.artifact import UnifiedWeights, save_model
from metamoe.common.model.inputs import prompt_tokens
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.presets import changed, load_settings, to_toml
from metamoe.simulations import prepare
from metamoe.simulations.train_seed import tokenizer_for
from tests.conftest import WORDS, random_expert, random_features, small_run
from tests.unit.simulations.test_report import BTM, METAMOE, results

PER_LAYER = ("router.decide=per-layer", "router.evidence=layer", "router.vectors=private", "lora.first-layer=0")
NAMES = ["one", "two", "three"]


@pytest.fixture(scope="module")
def preset(seed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("preset") / "small.toml"
    file.write_text(to_toml(small_run(seed_folder)))
    return file


@pytest.fixture(scope="module")
def run(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> metamoe.Run:
    out = tmp_path_factory.mktemp("run") / "out"
    changes = {"expert-training.epochs": 2, "proxies": {"count": 15}}
    return metamoe.simulate(preset, seed=3, settings=changes, out=out, backend="local")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{domain}.png" for domain in ("digits", "greek")]
    for file in files:
        load_domain(Settings().data, file.stem, "test")[0]["image"].save(file)
    return files


def saved(seed: Seed, settings: Settings, folder: Path) -> metamoe.Model:
    """A unified model with random experts, whose layers decide each for itself and differently."""
    routers = [
        RouterWeights(random_features(4, seed.width, layer).astype(np.float32), np.zeros(4, dtype=np.float32), 0.25)
        for layer in range(len(seed.ffn_paths))
    ]
    weights = UnifiedWeights([random_expert(seed, settings, k) for k in range(3)], routers)
    save_model(folder, seed, settings, NAMES, WORDS if seed.is_image_model else [], weights)
    return metamoe.load(folder)


@pytest.fixture(scope="module")
def of_images(seed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> metamoe.Model:
    settings = changed(small_run(seed_folder), PER_LAYER)
    return saved(load_seed(str(seed_folder)), settings, tmp_path_factory.mktemp("images") / "model")


@pytest.fixture(scope="module")
def of_text(seed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> metamoe.Model:
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tokenizer_for(WORDS)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, bos_token_id=1, eos_token_id=3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "seed")
    tokenizer.save_pretrained(folder / "seed")
    settings = changed(small_run(seed_folder), [*PER_LAYER, f"seed-model={folder / 'seed'}"])
    return saved(load_seed(str(folder / "seed")), settings, folder / "model")


def python(*arguments: str, cwd: Path) -> str:
    """What a Python of its own prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'datasets', 'pandas', 'ray', 'pydantic', 'rich') if m in sys.modules]"
    assert python("-c", f"import sys, metamoe; print({heavy})", cwd=tmp_path) == "[]"
    # What is needed to say that a setting is wrong is no more than the command needs for it.
    code = f"import sys, metamoe; metamoe.simulate; metamoe.open_run; metamoe.audit.verify; print({heavy})"
    assert python("-c", code, cwd=tmp_path) == "['pydantic', 'rich']"


def test_every_name_is_there_and_no_other() -> None:
    assert set(metamoe.__all__) <= set(dir(metamoe))
    for name in metamoe.__all__:
        assert getattr(metamoe, name).__doc__
    assert metamoe.audit.verify.__module__ == "metamoe.audit.verification"
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        metamoe.train  # noqa: B018


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_what_the_docs_show_is_there(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / page).read_text(), re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
    named = {"metamoe": metamoe, "run": metamoe.Run, "model": metamoe.Model, "decision": metamoe.Decision}
    shown = [(node.value.id, node.attr) for node in nodes if isinstance(node.value, ast.Name) and node.value.id in named]
    assert ("metamoe", "simulate") in shown
    for name, attribute in shown:
        assert hasattr(named[name], attribute) or attribute in named[name].__dataclass_fields__, f"{name}.{attribute}"


def test_a_run_is_what_its_folder_says(run: metamoe.Run, preset: Path) -> None:
    assert run.settings == load_settings(str(preset), ["seed=3", "expert-training.epochs=2", "proxies.count=15"])
    told = json.loads((run.folder / "results.json").read_text())
    assert run.results.accuracy == told["accuracy"]
    assert run.results.public_accuracy == told["public_accuracy"]
    assert run.results.routing == told["routing"]
    assert run.results.timings == told["timings"]
    assert (run.results.seed, run.results.missing) == (3, [])
    for client, raw in zip(run.results.clients, told["clients"], strict=True):
        assert (client.name, client.bytes_up, client.bytes_down) == (raw["name"], raw["bytes_up"], raw["bytes_down"])
        assert [array.model_dump(mode="json") for array in client.artifacts] == raw["artifacts"]
        assert client.bytes_up == sum(array.bytes for array in client.artifacts) > 0
    table = run.table()
    assert list(table.columns) == ["digits", "greek", "arrows", "average", "public"]
    assert list(table.index) == list(told["accuracy"])
    for method, row in told["accuracy"].items():
        assert table.loc[method].to_dict() == row | {"public": told["public_accuracy"][method]}
    assert run.model.manifest.model_hash == run.results.model
    assert run.model.experts == ["digits", "greek", "arrows", "seed"]


@pytest.mark.slow
def test_the_command_makes_the_same_model(run: metamoe.Run, tmp_path: Path, run_metamoe) -> None:
    out = tmp_path / "out"
    assert run_metamoe("simulate", "--preset", str(run.folder / "settings.toml"), "--out", str(out), "--backend", "local") == 0
    other = metamoe.open_run(str(out))
    assert other.settings == run.settings
    assert other.results.model == run.results.model
    assert other.table().equals(run.table())


@pytest.mark.slow
def test_progress_is_shown_only_if_asked(run: metamoe.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = {"preset": run.folder / "settings.toml", "backend": "local", "settings": {"data.test_samples": 20}}
    quiet = metamoe.simulate(**again, out=tmp_path / "out")
    shown = capsys.readouterr()
    assert "server trains the router" not in shown.out + shown.err
    assert quiet.settings.data.test_samples == 20
    assert metamoe.simulate(**again, clients=2, out=tmp_path / "out", overwrite=True, progress=True).settings.clients == 2
    assert "server trains the router" in capsys.readouterr().out


def test_a_notebook_that_cannot_move_bars_gets_them_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    for found, moving in ((None, False), (sys.__spec__, True)):
        monkeypatch.setattr(progress, "find_spec", lambda _name, found=found: found)
        console = progress.python_console()
        assert (console.is_jupyter, console.is_terminal) == (moving, False)


def test_events_of_server_and_clients_come_in_the_order_of_time(run: metamoe.Run) -> None:
    events = list(run.events())
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert events[0].time > 1.7e9
    lines = {"server": (run.folder / "events.jsonl").read_text().splitlines()}
    lines |= {d: (run.folder / "clients" / d / "events.jsonl").read_text().splitlines() for d in ("digits", "greek", "arrows")}
    assert Counter(event.by for event in events) == {by: len(of) for by, of in lines.items()}
    # Each client's own training, epoch by epoch, and the server's account of who is done.
    own = [(event.stage, event.done, event.total) for event in events if event.by == "greek"]
    assert own[-1] == ("expert", 2, 2)
    heard = [event.client for event in events if event.by == "server" and event.stage == "expert" and event.client]
    assert heard == ["digits", "greek", "arrows"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"preset": "none"}, PresetNotFoundError, "'none'"),
        ({"settings": {"nonsense": 1}}, UnknownSettingError, "'nonsense'; known here: clients"),
        ({"settings": {"proxies": {"size": 1}}}, UnknownSettingError, "'proxies.size'; known here: candidates, count"),
        ({"settings": {"seed.of": 1}}, UnknownSettingError, "'seed.of': 'seed' is not a group"),
        ({"settings": {"router.top_k": "many"}}, InvalidSettingError, "router.top-k = 'many'"),
        ({"settings": {"proxies.count": None}}, InvalidSettingError, "proxies.count = None"),
        ({"settings": {"proxies.count": 3_000}}, ProxyCountError, "proxies.count = 3000"),
        ({"clients": 0, "settings": {"clients": 2}}, InvalidSettingError, "clients = 0"),
        ({"seed": -1}, InvalidSettingError, "seed = -1"),
        ({"settings": {"data.domains": ["runes"]}}, InvalidSettingError, "runes"),
        ({"settings": {"seed-model": "nowhere"}}, InputFileError, "nowhere"),
        ({"backend": "cloud"}, InvalidSettingError, "backend = 'cloud' is none of ray, local"),
    ],
)
def test_what_is_wrong_has_the_errors_of_the_command(
    changes: dict[str, object], error: type[MetaMoEError], message: str, preset: Path, tmp_path: Path
) -> None:
    arguments = {"preset": preset, "backend": "local", "out": tmp_path / "out"} | changes
    with pytest.raises(error, match=message):
        metamoe.simulate(**arguments)
    assert not (tmp_path / "out" / "model").exists()


def test_a_run_is_replaced_only_if_asked_and_nothing_else_ever(run: metamoe.Run, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="overwrite=True"):
        metamoe.simulate(run.folder / "settings.toml", out=run.folder, backend="local")
    assert (run.folder / "results.json").is_file()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidSettingError, match="not a run"):
        metamoe.simulate(run.folder / "settings.toml", out=tmp_path, backend="local", overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_folder_without_a_finished_run_is_named(run: metamoe.Run, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"nowhere holds no settings.toml; give a run's folder"):
        metamoe.open_run(tmp_path / "nowhere")
    shutil.copy(run.folder / "settings.toml", tmp_path)
    with pytest.raises(RunFailedError, match="has not come to its end"):
        metamoe.open_run(tmp_path)
    # A run through Flower alone has a model, and no table.
    shutil.copytree(run.folder / "server", tmp_path / "server")
    shutil.copytree(run.folder / "model", tmp_path / "model")
    opened = metamoe.open_run(tmp_path)
    assert opened.model.manifest == run.model.manifest
    with pytest.raises(InputFileError, match=r"holds no results.json"):
        opened.table()
    (tmp_path / "results.json").write_text('{"preset": 3}')
    with pytest.raises(InputFileError, match=r"results.json is not a run's: preset"):
        opened.table()


def test_what_prepares_the_data_says_of_which_kind_its_failure_was(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidSettingError, match=r"data\.domains has 'runes'"):
        prepare.prepare_apart(load_settings(str(preset), ["data.domains=['runes']"]))
    monkeypatch.setattr(prepare, "_APART", (sys.executable, "-c", "print('{}'[:1]); raise SystemExit(7)"))
    with pytest.raises(RunFailedError, match="ended with 7"):
        metamoe.simulate(preset, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predictions_are_the_commands(
    run: metamoe.Run, images: list[Path], run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_metamoe("predict", str(run.folder / "model"), *map(str, images), "--top", "2") == 0
    shown = capsys.readouterr().out
    expected = ""
    for prediction in run.model.predict(images, top=2):
        expected += f"{prediction.image}\n" + "".join(f"  {p:6.1%}  {name}\n" for name, p in prediction.classes)
        expected += f"  tokens went to: {', '.join(f'{name} {share:.0%}' for name, share in prediction.experts if share > 0)}\n"
    assert shown == expected


def test_images_are_files_or_in_memory_one_or_several(of_images: metamoe.Model, images: list[Path]) -> None:
    first, second = of_images.predict(images)
    opened = [Image.open(file) for file in images]
    for one, image in zip((first, second), opened, strict=True):
        found = of_images.predict(image)
        assert (found.classes, found.experts) == (one.classes, one.experts)
        assert found.image is image
    assert of_images.predict(str(images[1])).classes == second.classes
    assert [len(p.classes) for p in of_images.predict(opened, top=9)] == [len(WORDS)] * 2
    assert of_images.predict([]) == []

    # Among two classes the odds are what they were among all.
    among = dict(of_images.predict(images[0], top=9).classes)
    two = dict(of_images.predict(images[0], classes=[WORDS[0], WORDS[3], WORDS[0]]).classes)
    assert set(two) == {WORDS[0], WORDS[3]}
    assert sum(two.values()) == pytest.approx(1)
    assert two[WORDS[0]] / two[WORDS[3]] == pytest.approx(among[WORDS[0]] / among[WORDS[3]], rel=1e-4)


def test_routing_is_what_the_highest_layer_that_decides_says(of_images: metamoe.Model, images: list[Path]) -> None:
    loaded = of_images.loaded
    for file, found in zip(images, of_images.route(images), strict=True):
        with torch.inference_mode():
            _, decisions = loaded.model(pixel_values(loaded.seed, [Image.open(file).convert("RGB")]))
        assert len(decisions) == 2
        expected = decisions[-1][0].exp().mean(0).tolist()
        assert found.probabilities == pytest.approx(dict(zip([*NAMES, "seed"], expected, strict=True)))
        assert found.probabilities != pytest.approx(
            dict(zip([*NAMES, "seed"], decisions[0][0].exp().mean(0).tolist(), strict=True)), abs=1e-3
        )
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert list(found.probabilities.values()) == sorted(found.probabilities.values(), reverse=True)
        assert (found.expert, found.probability) == max(found.probabilities.items(), key=lambda pair: pair[1])
        assert found.input == file
    assert of_images.route(Image.open(images[0])).probabilities == of_images.route(images[0]).probabilities


def test_a_prompt_is_routed_over_its_own_tokens(of_text: metamoe.Model) -> None:
    loaded, prompt = of_text.loaded, "LATIN SMALL LETTER A"
    ids = torch.tensor([loaded.seed.tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        _, decisions = loaded.model(prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    found = of_text.route(prompt)
    expected = decisions[-1][0].exp().mean(0).tolist()
    assert found.probabilities == pytest.approx(dict(zip([*NAMES, "seed"], expected, strict=True)))
    one, other = of_text.route([prompt, "BLACK SQUARE"])
    assert one == found
    assert other.probabilities != found.probabilities


def test_a_score_counts_the_predictions_that_are_right(of_images: metamoe.Model, tmp_path: Path) -> None:
    names, right = sorted(WORDS[:3]), 0
    samples = load_domain(Settings().data, "greek", "test").select(range(12))
    for number, sample in enumerate(samples):
        file = tmp_path / names[number % 3] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        sample["image"].save(file)
        right += of_images.predict(file, classes=names).classes[0][0] == names[number % 3]
    score = of_images.score(tmp_path)
    assert score.count == 12
    assert score.percent == pytest.approx(100 * right / 12)
    assert score.interval[0] < score.percent < score.interval[1]
    assert sum(share for _, share in score.experts) == pytest.approx(1, abs=1e-3)


WRONG: dict[str, tuple[Callable[[metamoe.Model], object], type[MetaMoEError], str]] = {
    "images asked for text": (lambda model: model.generate("hello"), InputFileError, "one of images"),
    "no image": (lambda model: model.predict(__file__), InputFileError, "cannot be read as an image"),
    "no file": (lambda model: model.route("nowhere.png"), InputFileError, "nowhere.png cannot be read"),
    "no class": (lambda model: model.predict([], classes=[]), InputFileError, "no class to choose among"),
    "no top": (lambda model: model.predict([], top=0), InvalidSettingError, "top = 0"),
    "no samples": (lambda model: model.score("nowhere"), InputFileError, "nowhere has no images"),
}


@pytest.mark.parametrize(("ask", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_a_model_of_images_cannot_take_is_named(
    ask: Callable[[metamoe.Model], object], error: type[MetaMoEError], message: str, of_images: metamoe.Model
) -> None:
    with pytest.raises(error, match=message):
        ask(of_images)


def test_what_a_model_of_text_cannot_take_is_named(of_text: metamoe.Model, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="one of text; ask it with 'metamoe generate'"):
        of_text.predict(images)
    with pytest.raises(InputFileError, match="one of text; give it prompts"):
        of_text.route(Image.open(images[0]))
    with pytest.raises(InvalidSettingError, match="max_tokens = 0"):
        of_text.generate("LATIN", max_tokens=0)
    with pytest.raises(ModelFileError, match=r"holds no manifest.json"):
        metamoe.load(tmp_path)


def test_ledgers_are_verified_for_a_run_or_a_folder(run: metamoe.Run, finished: Path, tmp_path: Path) -> None:
    found = metamoe.audit.verify(run)
    assert found.fine
    assert (found.verdict, found.findings) == (metamoe.audit.Verdict.FINE, [])
    assert [ledger.name for ledger in found.ledgers] == ["client-0", "client-1", "client-2", "server"]
    assert metamoe.audit.verify(str(finished)).fine
    for part in ("clients/audit", "server/audit"):
        shutil.copytree(run.folder / part, tmp_path / part)
    clients = tmp_path / "clients" / "audit"
    assert metamoe.audit.verify(clients / "client-0", key=clients / "client-0" / "audit.pub").fine
    assert not metamoe.audit.verify(clients / "client-0", key=clients / "client-1" / "audit.pub").fine
    ledger = clients / "client-1" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    found = metamoe.audit.verify(tmp_path)
    assert found.verdict is metamoe.audit.Verdict.TAMPERED
    assert {finding.where.partition(",")[0] for finding in found.findings} == {"client-1"}
    with pytest.raises(InputFileError, match="nowhere holds no ledger"):
        metamoe.audit.verify("nowhere")


def test_a_benchmark_is_what_its_folder_says(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(results().model_dump_json())
    benchmark = metamoe.Benchmark(tmp_path)
    assert benchmark.results == results()
    table = benchmark.table()
    assert list(table.index) == [*results().methods, *results().ablations]
    assert table.loc["btm", "average"] == pytest.approx(sum(BTM) / 5)
    assert table.loc["btm", "deviation"] == pytest.approx(np.std(BTM, ddof=1))
    assert table.loc["btm", "better"] == pytest.approx(sum(METAMOE) / 5 - sum(BTM) / 5)
    assert table.loc["btm", "low"] < table.loc["btm", "better"] < table.loc["btm", "high"]
    assert table.loc["metamoe", ["better", "low", "high"]].isna().all()
    assert table.loc["metamoe", "own"] == pytest.approx(0.7)
    assert table.loc["proxies: random", "group"] == "proxies"
    assert "metamoe" in benchmark.report().read_text()
    with pytest.raises(InputFileError, match=r"holds no results.json"):
        metamoe.Benchmark(tmp_path / "nowhere").table()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["best"]}, InvalidSettingError, "unknown method 'best'; there are all, zero-shot"),
        ({"ablations": ["size"]}, InvalidSettingError, "unknown ablation 'size'; there are all, proxies"),
        ({"settings": {"seed": 3}}, InvalidSettingError, "seed: a benchmark decides this itself"),
        ({"settings": {"compute": {"server_threads": 3}}}, InvalidSettingError, "compute.server-threads: a benchmark"),
        ({"settings": {"nonsense": 3}}, UnknownSettingError, "'nonsense'"),
        ({"seeds": 0}, InvalidSettingError, "seeds = 0"),
    ],
)
def test_what_is_wrong_with_a_benchmark_is_named(
    changes: dict[str, object], error: type[MetaMoEError], message: str, preset: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        metamoe.benchmark(preset, **{"out": tmp_path / "out", "methods": ["zero-shot"]} | changes)
    assert not (tmp_path / "out").exists()


SIMULATED = """
import metamoe
run = metamoe.simulate({preset!r}, out="run")
print(run.results.model)
"""
COMPARED = """
import metamoe
if __name__ == "__main__":
    found = metamoe.benchmark({preset!r}, methods=["zero-shot", "metamoe"], seeds=1, out="found")
    print(found.results.command, *found.table()["average"])
"""
UNGUARDED = """
import metamoe
try:
    metamoe.benchmark({preset!r}, methods=["zero-shot"], seeds=1, out="unguarded")
except metamoe.MetaMoEError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_scripts_simulate_on_ray_and_compare(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    # As Jupyter has it, under which Flower would colour its JSON.
    monkeypatch.setenv("FORCE_COLOR", "1")

    def run(name: str, text: str) -> str:
        (tmp_path / name).write_text(text.format(preset=str(preset)))
        return python(name, cwd=tmp_path)

    # Three lines as they stand: no process imports the script again.
    model = run("simulated.py", SIMULATED)
    local = metamoe.simulate(preset, out=tmp_path / "local", backend="local")
    assert model == local.results.model
    assert metamoe.open_run(tmp_path / "run").table().equals(local.table())

    command, zero_shot, unified = run("compared.py", COMPARED).rsplit(" ", 2)
    assert command == f"metamoe.benchmark({str(preset)!r}, methods=['zero-shot', 'metamoe'], seeds=1)"
    averages = local.table()["average"]
    assert (float(zero_shot), float(unified)) == pytest.approx((averages["zero-shot"], averages["metamoe"]), abs=0.02)
    assert "RunFailedError a process of the benchmark died" in run("unguarded.py", UNGUARDED)


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_to_the_same_model(run: metamoe.Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.folder, out)
    (out / "server" / "summary.json").unlink()
    (out / "results.json").unlink()
    (out / "model" / "router.safetensors").unlink()
    with pytest.raises(RunFailedError, match=r"metamoe\.resume goes on with it"):
        metamoe.open_run(out)
    again = metamoe.resume(out)
    assert again.results.model == run.results.model
    assert metamoe.resume(out).results == again.results
