"""The layering of the house, read from the imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "common", "deploy", "server", "simulations")
ALLOWED = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "deploy": {"deploy", "common"},
    "simulations": {"client", "common", "deploy", "server", "simulations"},
}
FLOWER = {"client/app.py", "client/egress.py", "common/wire.py", "server/app.py", "server/strategy.py"}
NUMPY_ONLY = {"common/fisher.py", "server/dpp.py", "server/relevance.py"}


def modules() -> dict[str, set[str]]:
    """Every module's file, and all that it imports at any level."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), (
                f"relative import in {file}"
            )
            found[file.relative_to(ROOT).as_posix()] = names
    return found


def test_packages_import_only_what_is_below_them() -> None:
    for file, names in modules().items():
        ours = {name.split(".")[0] for name in names} & set(PACKAGES)
        assert ours <= ALLOWED[file.split("/")[0]], f"{file} imports {ours}"


def test_flower_is_at_the_edges_only() -> None:
    for file, names in modules().items():
        if any(name.split(".")[0] == "flwr" for name in names):
            assert file in FLOWER or file.startswith("simulations/"), f"{file} imports flwr"


def test_ray_is_in_simulations_only() -> None:
    for file, names in modules().items():
        if any(name.split(".")[0] == "ray" for name in names):
            assert file.startswith("simulations/"), f"{file} imports ray"


def test_selection_is_without_torch() -> None:
    found = modules()
    for file in NUMPY_ONLY:
        heavy = {name.split(".")[0] for name in found[file]} & {"torch", "transformers", "datasets"}
        assert not heavy, f"{file} imports {heavy}"
