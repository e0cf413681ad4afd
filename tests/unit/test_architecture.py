"""The layering of the house, read from the imports."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BELOW = {
    "common": set[str](),
    "client": {"common"},
    "server": {"common"},
    "deploy": {"common"},
    "audit": {"client", "common", "server"},
    "simulations": {"audit", "client", "common", "deploy", "server"},
    "metamoe": {"audit", "client", "common", "deploy", "server", "simulations"},
}
"""The rooms, and what each may import beside itself."""
FLOWER = {
    *("client/app.py", "client/egress.py", "common/bundle.py", "common/wire.py", "server/app.py", "server/strategy.py"),
}
NUMPY_ONLY = {"common/fisher.py", "server/dpp.py", "server/relevance.py"}


def modules() -> dict[str, set[str]]:
    """Every module's file, and all that it imports at any level."""
    found = {}
    for room in BELOW:
        for file in (ROOT / room).rglob("*.py"):
            tree = ast.parse(file.read_text())
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    assert not node.level, f"relative import in {file}"
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
            found[file.relative_to(ROOT).as_posix()] = names
    return found


def room_of(module: str) -> str | None:
    """The room that a module of ours is in; metamoe's own have no room in their name."""
    first, _, rest = module.partition(".")
    if first != "metamoe":
        return None
    second = rest.partition(".")[0]
    return second if second in BELOW else "metamoe"


def test_rooms_import_only_what_is_below_them() -> None:
    for file, names in modules().items():
        room = file.split("/")[0]
        ours = {found for found in map(room_of, names) if found} - {room}
        assert ours <= BELOW[room], f"{file} imports {ours - BELOW[room]}"


def test_models_know_no_data() -> None:
    for file, names in modules().items():
        if file.startswith("common/model/"):
            assert not any(name.startswith(("metamoe.common.data", "datasets")) for name in names), f"{file} imports data"


def test_the_owner_s_gateway_needs_no_client_s_code() -> None:
    for file, names in modules().items():
        if file.startswith("audit/gateway/"):
            assert not any(name.startswith(("metamoe.client", "metamoe.server")) for name in names), (
                f"{file} imports the other side"
            )


def test_rooms_are_imported_under_metamoe_alone() -> None:
    files = [file for top in (*BELOW, "tests", "benchmarks") for file in (ROOT / top).rglob("*.py")]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & (set(BELOW) - {"metamoe"}), f"{file} imports {names}"


def test_every_package_is_installed() -> None:
    """Each folder with an __init__.py is in setuptools' list, or a wheel would lack it."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-dir"] == {f"metamoe.{room}": room for room in BELOW if room != "metamoe"} | {"metamoe": "metamoe"}
    folders = [file.parent.relative_to(ROOT) for room in BELOW for file in (ROOT / room).rglob("__init__.py")]
    assert sorted(setup["packages"]) == sorted(
        ".".join(("metamoe", *f.parts)).replace("metamoe.metamoe", "metamoe") for f in folders
    )


def test_flower_is_at_the_edges_only() -> None:
    for file, names in modules().items():
        if any(name.split(".")[0] == "flwr" for name in names):
            assert file in FLOWER or file.startswith(("simulations/", "audit/gateway/")), f"{file} imports flwr"


def test_ray_is_in_simulations_only() -> None:
    for file, names in modules().items():
        if any(name.split(".")[0] == "ray" for name in names):
            assert file.startswith("simulations/"), f"{file} imports ray"


def test_selection_is_without_torch() -> None:
    found = modules()
    for file in NUMPY_ONLY:
        heavy = {name.split(".")[0] for name in found[file]} & {"torch", "transformers", "datasets"}
        assert not heavy, f"{file} imports {heavy}"
