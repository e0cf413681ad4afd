"""Tables show every name and number in full, whatever the width."""

import io

import pytest
from rich.console import Console

from metamoe.show import show_numbers


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("domains", [3, 6, 12])
def test_no_name_and_no_number_is_cut(width: int, domains: int) -> None:
    names = [f"capital-letters-{k}" for k in range(domains)]
    methods = ["zero-shot", *(f"expert:{name}" for name in names), "metamoe"]
    rows = [[method, *(f"{10 * i + j / 10:.1f}" for j in range(domains + 2))] for i, method in enumerate(methods)]
    shown = io.StringIO()
    show_numbers(Console(file=shown, width=width), "accuracy", ["method", *names, "average", "public, held out"], rows)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:
        own = " ".join(line for line in lines if f" {row[0]} " in line).split()
        assert all(cell in own for cell in row)
    assert all(name in shown.getvalue() for name in [*names, "average", "public, held out"])


def test_with_room_there_is_one_part() -> None:
    shown = io.StringIO()
    show_numbers(Console(file=shown, width=80), "accuracy", ["method", "a", "b"], [["metamoe", "1.0", "2.0"]])
    assert "continued" not in shown.getvalue()
