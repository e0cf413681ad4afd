"""Writes a question set of two domains and instructions as the public set: python write.py FOLDER."""

import json
import random
import sys
from itertools import product
from pathlib import Path

KITCHEN = {"bread": "oven", "soup": "pot", "milk": "fridge", "dough": "bowl", "egg": "pan", "tea": "cup"}
WORKSHOP = {"nail": "hammer", "screw": "driver", "board": "saw", "bolt": "wrench", "wall": "brush", "edge": "file"}
ASKED = ("What goes with {}?", "Which one is for {}?", "For {} you take the", "What do you need for {}?", "Choose for {}.")


def questions(pairs: dict[str, str], rng: random.Random) -> list[dict[str, object]]:
    """Each thing asked for in each way, with the right choice among two others."""
    rows = []
    for (thing, right), asked in product(pairs.items(), ASKED):
        choices = [right, *rng.sample([other for other in pairs.values() if other != right], 2)]
        rng.shuffle(choices)
        rows.append({"question": asked.format(thing), "choices": choices, "answer": choices.index(right)})
    return rows


def main(folder: Path) -> None:
    """Fill the folder: kitchen, workshop, and public."""
    rng = random.Random(0)
    pairs = [*KITCHEN.items(), *WORKSHOP.items()]
    sets: dict[str, list[dict[str, object]]] = {
        "kitchen": questions(KITCHEN, rng),
        "workshop": questions(WORKSHOP, rng),
        "public": [{"instruction": asked.format(thing), "output": right} for thing, right in pairs for asked in ASKED],
    }
    for name, rows in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rng.shuffle(rows)
        (folder / name / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
