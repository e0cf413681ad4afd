"""The commands ``metamoe model``: what a model consists of, the same changed for one client, and what is near to none."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from metamoe.common.errors import InputFileError
from metamoe.options import Device, Precise, Precision, console, json_option, notes, put_json
from metamoe.show import show_table

model = typer.Typer(
    no_args_is_help=True,
    help="What a unified model consists of, one client taken out, added or asked anew, and what no client is near to.",
)

Place = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of the model in it.")]
Client = Annotated[str, typer.Argument(help="The client's name, as 'metamoe model show' has it.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the new run, new or empty. (default: beside RUN, by what is done)")]
AsJson = Annotated[bool, json_option("folder, model (hash), asked (by client, what it was asked), said")]


@model.command()
def show(
    place: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a unified model, or of its run.")],
    as_json: Annotated[
        bool,
        json_option("model (hash), seed_model, decides, top_k, experts (name, bytes, clients, sent_in), without, changes"),
    ] = False,
) -> None:
    """Show a model's experts, whose they are, the run in which each was sent, and how the model was changed. Every file's hash
    is checked.
    """
    from metamoe.changes import overview

    found = overview(place)
    if as_json:
        put_json(asdict(found))
        return
    console.print(f"model {found.model}", highlight=False, soft_wrap=True)
    console.print(f"seed {found.seed_model}; decides {found.decides}, asks {found.top_k}", highlight=False, soft_wrap=True)
    rows = [[e.name, ", ".join(e.clients), f"{e.bytes:,}", (e.sent_in or "")[:8]] for e in found.experts]
    show_table(console, ["expert", "of clients", "bytes", "sent in run"], rows)
    if found.without:
        console.print(f"without: {', '.join(found.without)}", highlight=False, soft_wrap=True)
    for line in found.changes:
        console.print(
            f"{line['at']} {line['change']} {line['client']}, from model {line['from']['model'][:12]}", soft_wrap=True
        )


@model.command()
def remove(place: Place, client: Client, out: Out = None, as_json: AsJson = False) -> None:
    """Make the model that a run without this client makes, bit for bit. Nobody computes but the server, and the others receive
    the new model. RUN stays as it is: delete it to delete the expert.
    """
    _change(place, "remove", client, out, f"without-{client}", as_json)


@model.command()
def add(place: Place, client: Client, out: Out = None, as_json: AsJson = False) -> None:
    """Make the model that a run with one client more makes, bit for bit: one that was removed, was missing or has a free place
    (setting 'without'), or a new domain. It alone is asked for its means and trains its expert.
    """
    _change(place, "add", client, out, f"with-{client}", as_json)


@model.command()
def refresh(
    place: Place,
    client: Client,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another public set, out of which this client's proxies are chosen: data.public, data.public-hub, "
            "data.public-samples, data.public-without. It must hold all proxies of the others, who keep theirs.",
        ),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Ask one client anew, as when its data or the public set has changed: its means, its proxies and its expert are new, the
    others' stay.
    """
    _change(place, "refresh", client, out, f"refreshed-{client}", as_json, tuple(settings or ()))


@model.command()
def drift(
    place: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a unified model, e.g. runs/demo/model.")],
    data: Annotated[
        Path,
        typer.Option(help="A folder of pictures, at any depth; of text a file of questions, or .txt with a prompt a line."),
    ],
    fail_above: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Share of inputs near to no client, %, above which the exit code is 1."),
    ] = None,
    device: Device = "auto",
    precision: Precise = Precision.float32,
    as_json: Annotated[
        bool, json_option("count, none, percent, near (inputs by expert), examples (input, probability), fine")
    ] = False,
) -> None:
    """Say of inputs how many are near to no client, by the Gaussians that route: many of them tell that a client is missing."""
    from metamoe.model import load

    loaded = load(place, device, precision.value)
    with notes.status("looking at inputs"):
        found = loaded.drift(data)
    fine = fail_above is None or found.percent <= fail_above
    if as_json:
        put_json({**asdict(found), "percent": found.percent, "fine": fine})
    else:
        rows = [[name, str(count), f"{100 * count / found.count:.1f}"] for name, count in found.near.items()]
        rows.append(["none", str(found.none), f"{found.percent:.1f}"])
        show_table(console, ["near to", "inputs", "%"], rows)
        for name, probability in found.examples:
            console.print(f"{probability:6.1%}  {name}", markup=False, highlight=False, soft_wrap=True)
    if not fine:
        raise typer.Exit(1)


def _change(
    place: Path,
    kind: Literal["remove", "add", "refresh"],
    client: str,
    out: Path | None,
    suffix: str,
    as_json: bool,
    public: tuple[str, ...] = (),
) -> None:
    from metamoe.changes import begin, overview, run_folder
    from metamoe.server.changes import Change

    old = run_folder(place)
    target = (out or old.with_name(f"{old.name}-{suffix}")).absolute()
    begun = begin(old, Change(kind, client, public), target)
    for line in begun.said:
        notes.print(line, markup=False, highlight=False, soft_wrap=True)
    if begun.deployed:
        from metamoe.cli_deploy import follow

        federation = old.parent.parent
        if not (federation / "federation.toml").is_file():
            raise InputFileError(
                f"{target} is ready, but {old} lies in no federation's folder; go on with 'metamoe deploy resume FOLDER "
                f"{target}'"
            )
        follow(federation, begun.settings, target)
    else:
        from metamoe.simulation import resume_simulation

        resume_simulation(target, notes)
    made = overview(target).model
    if as_json:
        put_json({"folder": str(target), "model": made, "asked": begun.asked, "said": begun.said})
        return
    console.print(f"model: {target / 'model'}\nhash: {made}", highlight=False, soft_wrap=True)
    if not begun.deployed and begun.from_beginning:
        console.print(
            f"the same from the beginning, to compare: metamoe simulate --preset {target / 'settings.toml'} --out FOLDER",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
