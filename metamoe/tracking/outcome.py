"""What a run has come to, as trackers take it; and a folder told of afterwards."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from metamoe.common.errors import InputFileError
from metamoe.common.files import read_json
from metamoe.common.presets import load_settings
from metamoe.follow import followed, logs_of_run
from metamoe.simulations.benchmark.pictures import share_picture
from metamoe.simulations.page import sample_sheets, write_run_page
from metamoe.simulations.results import accuracy_rows
from metamoe.tracking import Outcome, Service, tracked


def outcome_of(folder: Path) -> Outcome:
    """What the run in a folder has come to; its page is written too.

    Raises:
        InputFileError: the folder holds no run that has come to its end.
    """
    page = write_run_page(folder)
    summary = read_json(folder / "server" / "summary.json")
    numbers = {f"seconds/{stage}": float(seconds) for stage, seconds in summary["timings"].items()}
    numbers |= {f"bytes-up/{client['name']}": float(client["bytes_up"]) for client in summary["clients"]}
    if not (folder / "results.json").is_file():
        numbers |= {f"accuracy/{name}": float(value) for name, value in summary["reported"].items()}
        return Outcome(summary["model"], numbers, page=page)
    results = read_json(folder / "results.json")
    for method, by_domain in results["accuracy"].items():
        numbers |= {f"accuracy/{method}/{domain}": value for domain, value in by_domain.items()}
        numbers[f"accuracy/{method}/public"] = results["public_accuracy"][method]
    experts = list(next(iter(results["routing"].values())))
    shares = np.array([list(of.values()) for of in results["routing"].values()])
    pictures = {"routing": share_picture(shares, list(results["routing"]), experts)}
    pictures |= {f"proxies/{name}": _png(sheet) for name, sheet in sample_sheets(folder).items()}
    return Outcome(summary["model"], numbers, {"accuracy": accuracy_rows(results)}, pictures, page)


def track_folder(folder: Path, services: Sequence[Service]) -> dict[Service, str]:
    """Tell services of what lies in a folder: a run's, or one of a deployed client's own.

    Returns:
        How each service calls the run.

    Raises:
        InputFileError: there is nothing that a training wrote.
        InvalidSettingError: a service cannot be told.
    """
    settings = load_settings(str(folder / "settings.toml")) if (folder / "settings.toml").is_file() else None
    logs = logs_of_run(settings, folder) if settings else dict.fromkeys(sorted(folder.rglob("events.jsonl")), True)
    if not any(file.is_file() for file in logs):
        raise InputFileError(f"{folder} holds no events.jsonl: give the folder of a run, or of a client that has trained")
    ended = (folder / "server" / "summary.json").is_file()
    with tracked(services, folder, settings) as trackings:
        with followed(logs, trackings):
            # What is there by now is read to its end.
            pass
        for tracking in trackings if ended else ():
            tracking.outcome(outcome_of(folder))
        return {tracking.service: tracking.id for tracking in trackings}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
