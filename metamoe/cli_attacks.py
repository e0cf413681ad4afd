"""The commands ``metamoe audit canary`` and ``attack``: searching and attacking what leaves."""

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamoe.audit.report import MEANING
from metamoe.common.audit.policy import DEFAULT, Policy, load_policy
from metamoe.common.audit.verify import Verdict
from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError
from metamoe.common.files import write_json
from metamoe.common.presets import load_settings
from metamoe.options import Set, console, json_option, notes, put_json
from metamoe.show import show_table

_SMALL = (
    *("data.private-samples=100", "data.public-samples=600", "proxies.count=30", "proxies.pool=200"),
    *("expert-training.epochs=1", "router-training.epochs=1"),
)


def canary(
    preset: Annotated[str, typer.Option(help="Preset or TOML file of the run.")] = "glyphs",
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Empty folder to keep the run in. (default: a temporary one, removed at the end)")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The preset's own sizes, in place of a small run of a minute.")] = False,
) -> None:
    """Plant unmistakable records in private sets, run all stages, and search everything that left for them, raw and in
    disguise. What leaves has the same form in a small run as in a large one.
    """
    settings = load_settings(preset, [*([] if full else _SMALL), *(set_ or [])])
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputFileError(f"--out {out} is not an empty folder; give another one")
    from metamoe.audit.canary import run_canary

    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(TemporaryDirectory()))
        with notes.status("running, and searching what left"):
            found = run_canary(settings, folder.absolute())
    replies = [place for place in found.places if place.startswith("client ")]
    console.print(
        f"searched {len(replies)} replies, what the server made of them, and the ledgers: {len(found.places)} places, "
        f"{sum(found.places.values()):,} bytes, with {found.controls} controls",
        highlight=False,
        soft_wrap=True,
    )
    for hit in found.found:
        console.print(f"found: {hit}", style="red", markup=False, highlight=False, soft_wrap=True)
    for control in found.blind:
        console.print(f"the search did not find its own control: {control}", style="red", soft_wrap=True)
    verdict = Verdict.VIOLATION if found.found else Verdict.INCOMPLETE if found.blind else Verdict.FINE
    console.print("no canary left" if verdict is Verdict.FINE else MEANING[verdict], style="bold")
    raise typer.Exit(int(verdict))


def attack(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a finished simulation on built-in data; none for --differencing.")
    ] = None,
    shadows: Annotated[
        int, typer.Option(min=0, help="Shadow experts of each client for the likelihood ratio attack; 0 leaves it out.")
    ] = 8,
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Attack this client; repeatable. (default: every client)")
    ] = None,
    differencing: Annotated[
        bool,
        typer.Option(
            "--differencing",
            help="Attack a client over many runs in place of one simulation, under a policy and without its rules.",
        ),
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(help="For --differencing: the client's policy. (default: the one that comes with the product)"),
    ] = None,
    preset: Annotated[str, typer.Option(help="For --differencing: preset or TOML file of the first run.")] = "glyphs",
    set_: Set = None,
    as_json: Annotated[bool, json_option("what attack.json holds; with --differencing its table")] = False,
) -> None:
    """Attack a simulation as its server could: the private mean from what was sent, the mix of classes from the proxies, and
    membership from the expert's weights and from the shape. Writes attack.json to the run's folder. A shadow expert takes as
    long as a client's.

    With --differencing, attack the first client of a federation as a server could that asks often: each run's seed chooses
    another half of the private samples, and the means of all are solved for each sample.
    """
    if differencing:
        _show_differencing(load_policy(policy) if policy else DEFAULT, load_settings(preset, set_ or []), as_json)
        return
    if run is None:
        raise InputFileError("give the folder of a finished simulation, or --differencing")
    from metamoe.audit.attacks import as_json as results_json
    from metamoe.audit.attacks import attack as attacked

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(TextColumn("experts, own and shadow"), *columns, console=notes) as progress:
        task = progress.add_task("", total=None)
        results = attacked(run, shadows, lambda done, total: progress.update(task, completed=done, total=total), client or [])
    settings = load_settings(str(run / "settings.toml"))
    written = results_json(settings, results)
    write_json(run / "attack.json", written)
    if as_json:
        put_json(written)
        return
    privacy = settings.privacy
    title = (
        f"privacy.vectors = {privacy.vectors}, privacy.expert = {privacy.expert}, router.vectors = {settings.router.vectors}"
    )
    header = ("client", "mean, error", "mean by guesses of N", "class mix, r", "top class")
    rows = []
    for name, result in results.items():
        means = (result.mean_error, result.guessed_error, result.class_mix)
        membership = (result.loss_auc, result.lira_auc, result.lira_tpr, result.shape_auc)
        shown = [["" if n is None else f"{n:.3f}" for n in numbers] for numbers in (means, membership)]
        rows.append([name, *shown[0], "right" if result.top_class else "wrong", *shown[1]])
    show_table(console, [*header, "loss AUC", "LiRA AUC", "found at 1% false", "shape AUC"], rows, title=title)


def _show_differencing(policy: Policy, settings: Settings, as_json: bool) -> None:
    from metamoe.audit.differencing import UNRULED, differencing

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    found = {}
    with Progress(TextColumn("runs asked for"), *columns, console=notes) as progress:
        for name, held in (("without rules over all runs", UNRULED), ("under the policy", policy)):
            found[name] = differencing(settings, held, partial(_advance, progress, progress.add_task("", total=None)))
    if as_json:
        put_json({name: asdict(result) for name, result in found.items()})
        return
    header = ["client 0", "runs", "answered", "different means", "nearest to its own sample", "cosine", "nearer than the mean"]
    rows = [
        [name, str(r.runs), str(r.answered), str(r.different), f"{r.nearest:.1%}", f"{r.cosine:.4f}", f"{r.better:.1%}"]
        for name, r in found.items()
    ]
    samples = next(iter(found.values())).samples
    show_table(console, header, rows, title=f"what a server reconstructs of {samples} private samples")
    for reason, count in found["under the policy"].refused.items():
        console.print(f"refused {count} times: {reason}", markup=False, highlight=False, soft_wrap=True)


def _advance(progress: Progress, task: TaskID, done: int, of: int) -> None:
    progress.update(task, completed=done, total=of)
