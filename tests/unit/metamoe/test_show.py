"""Tables at every width: nothing is cut, and nothing is wider than the screen."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from metamoe.show import show_table

_DOMAINS = ("digits", "numerals", "greek", "cyrillic", "arrows", "operators", "hiragana", "musical-notation", "braille")
_DOMAINS += ("emoji", "box-drawing", "currency")


def shown(header: list[str], rows: list[list[str]], width: int | None, **options: object) -> str:
    """What is shown on a terminal of a width; None: in a file."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    show_table(console, header, rows, **options)
    return file.getvalue()


def cells(text: str) -> list[list[str]]:
    """The rows of the tables that were shown, headers left out."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def methods(domains: int) -> tuple[list[str], list[list[str]]]:
    """A run's table: every number occurs once."""
    header = ["method", *_DOMAINS[:domains], "average", "public, held out"]
    names = ["zero-shot", *(f"expert:{name}" for name in _DOMAINS[:domains]), "metamoe"]
    return header, [[name, *(f"{i}{j:02}.5" for j in range(len(header) - 1))] for i, name in enumerate(names)]


@pytest.mark.parametrize("domains", [3, 6, 12])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_method_and_every_number_is_there_in_full(domains: int, width: int) -> None:
    header, rows = methods(domains)
    text = shown(header, rows, width, title="accuracy on test data, %")
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert text.count("accuracy on test data, %") == 1
    found: dict[str, list[str]] = {}
    for name, *numbers in cells(text):
        found.setdefault(name, []).extend(numbers)
    assert found == {name: numbers for name, *numbers in rows}
    for name in header:
        assert all(word in text for word in name.split())


def test_a_table_is_parted_only_where_it_must_be() -> None:
    header, rows = methods(6)
    assert len(cells(shown(header, rows, 80))) == 2 * len(rows)
    assert len(cells(shown(header, rows, 200))) == len(rows)
    # Three domains fit with their names in two lines.
    assert len(cells(shown(*methods(3), 80))) == 5


def test_in_a_file_a_row_is_a_line_whatever_its_length() -> None:
    header, rows = methods(12)
    header, rows = [*header, "remark"], [[*row, "word " * 40 + "end"] for row in rows]
    assert cells(shown(header, rows, None)) == rows


def test_words_wrap_and_only_long_ones_break() -> None:
    array = "vision_model.encoder.layers.1.mlp.fc1.lora_A.weight"
    rows = [["train.expert", array, "float16 [16, 64]", "2,048"], ["train.expert", "[bold]", "a part of speech", ""]]
    text = shown(["when", "array", "form", "bytes"], rows, 70, grouped=True)
    assert max(map(len, text.splitlines())) <= 70
    columns = list(zip(*cells(text), strict=True))
    assert array in "".join(columns[1])
    assert "[bold]" in columns[1]
    assert " ".join(filter(None, columns[2])) == "float16 [16, 64] a part of speech"
    assert "2,048" in columns[3]


def test_groups_are_parted_by_a_line_and_numbers_set_to_the_right() -> None:
    rows = [["a", "1", "x"], ["a", "1,000", "x"], ["b", "-2.5 ± 0.1", "x"], ["b", "", "x"]]
    lines = shown(["client", "count", "what"], rows, 80, grouped=True).splitlines()
    assert [line.startswith("├") for line in lines[3:-1]] == [False, False, True, False, False]
    assert lines[3] == "│ a      │          1 │ x    │"


def test_the_tables_of_a_run_fit_a_terminal(finished: object, run_metamoe, monkeypatch) -> None:
    from metamoe import cli_audit

    for command in (("verify",), ("reconcile",), ("budget",)):
        file = io.StringIO()
        monkeypatch.setattr(cli_audit, "console", Console(file=file, width=80, force_terminal=True, color_system=None))
        assert run_metamoe("audit", *command, str(finished)) == 0
        text = file.getvalue()
        assert "…" not in text
        assert "client-2" in text
