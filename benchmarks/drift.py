"""How many samples of each built-in domain a model of preset glyphs finds near to none: python -m benchmarks.drift MODEL"""

from pathlib import Path

import torch
import typer

import metamoe
from metamoe.common.config import Data
from metamoe.common.data import glyphs
from metamoe.common.data.datasets import load_domain, load_public
from metamoe.common.data.pixels import batches
from metamoe.drift import nearness, prior_odds

_SAMPLES = 200


@torch.inference_mode()
def main(model: Path) -> None:
    """Print a row for each domain, and one for held-out public samples; of domains it takes validation samples."""
    loaded = metamoe.load(model).loaded
    data = Data(test_samples=_SAMPLES)
    sets = {domain: load_domain(data, domain, "validation") for domain in glyphs.DOMAINS}
    held_out = load_public(data, "test")
    sets["public"] = held_out.select(range(0, len(held_out), -(-len(held_out) // _SAMPLES)))
    typer.echo("| samples of | number | near to none, % |\n|---|---|---|")
    for name, samples in sets.items():
        far = 0
        for pixels in batches(loaded.seed, samples, 50):
            foreign, _ = nearness(loaded.model(pixels)[1][0], prior_odds(loaded.manifest.router), pixels)
            far += int((foreign > 0.5).sum())
        typer.echo(f"| {name} | {len(samples)} | {100 * far / len(samples):.1f} |")


if __name__ == "__main__":
    typer.run(main)
