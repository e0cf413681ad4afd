"""After stage 3 at the client: the unified model comes back, is stored, and is evaluated where the data is."""

from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

from metamoe.common.compute import place_of
from metamoe.common.config import Settings
from metamoe.common.data.metrics import answered, metrics_of
from metamoe.common.data.tasks import class_names, samples_of
from metamoe.common.files import write_json
from metamoe.common.model.artifact import UnifiedWeights, load_model, save_model
from metamoe.common.model.seed import Seed


def store_and_evaluate(
    seed: Seed,
    settings: Settings,
    names: list[str],
    classes: list[str],
    weights: UnifiedWeights,
    test: Dataset,
    state: Path,
) -> float:
    """Write the model to ``state/model`` and its accuracy on the client's own test samples, in percent, with all other metrics
    to ``state/accuracy.json``. Text that is no question is told from the answers of three others.
    """
    manifest = save_model(state / "model", seed, settings, names, classes, weights)
    model = load_model(state / "model", place_of(settings.compute, "client")).model
    samples = samples_of(seed, settings.data, [test], class_names(test))
    found = answered(model.scores, samples)
    percent = 100.0 * found.chosen.eq(samples.answers).float().mean().item()
    content = {"model": manifest.model_hash, "accuracy": percent, "metrics": asdict(metrics_of(found, samples))}
    write_json(state / "accuracy.json", content)
    return percent
