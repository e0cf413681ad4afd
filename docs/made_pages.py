"""What "make docs" adds to the pages here: the reference of the Python face and of the commands, the notebook, the examples'
pages, and two files of the repository.
"""

import json
import posixpath
import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

import metamoe
from metamoe.cli import app

_ROOT = Path(__file__).parents[1]
# Where the site shows a file that a page links to; the rest of the repository it names by its path.
_SHOWN = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    pages = {
        "reference.md": python_reference(),
        "commands.md": command_reference(),
        "tutorial.md": notebook_page(_ROOT / "docs" / "tutorial.ipynb"),
        "changelog.md": (_ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (_ROOT / "CONTRIBUTING.md").read_text(),
        **{_place(file): file.read_text() for file in sorted((_ROOT / "examples").glob("**/README.md"))},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Point links at files outside docs/ to where the site shows them, or name the file's path."""
    own = page.file.src_uri
    # Made pages are read from elsewhere: links in them start at their place in the repository.
    made = {shown: file for file, shown in _SHOWN.items() if shown != "index.md"}
    made |= {_place(file): file.relative_to(_ROOT).as_posix() for file in (_ROOT / "examples").glob("**/README.md")}
    source = made.get(own, f"docs/{own}")

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (_ROOT / target).exists() and files.get_file_from_path(target.removeprefix("docs/")) is None:
            return match[0]  # mkdocs says that it is broken
        shown = _SHOWN.get(target) or (
            _place(_ROOT / target) if target.startswith("examples/") else target.removeprefix("docs/")
        )
        if files.get_file_from_path(shown) is None:
            return text if text.startswith("`") else f"{text} (`{target}`)"
        there = posixpath.relpath(shown, posixpath.dirname(own) or ".")
        return f"{mark}[{text}]({there}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Take out the roles that docstrings give names, such as :func:, which the page would show."""
    return re.sub(r":(func|class|meth|data):(?=<code>)", "", html)


def python_reference() -> str:
    """A page of all that ``import metamoe`` has for users."""
    lines = ["# Reference of the Python face", "", "All of `metamoe.__all__`; [python.md](python.md) shows it at work.", ""]
    for name in sorted(set(metamoe.__all__) - {"audit"}, key=str.lower):
        lines += [f"::: metamoe.{name}", "    options: {heading_level: 2}", ""]
    for name in sorted(metamoe.audit.__all__):
        lines += [f"::: metamoe.audit.{name}", "    options: {heading_level: 2, show_root_full_path: true}", ""]
    return "\n".join(lines)


def command_reference() -> str:
    """A page of every command, by typer."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="metamoe")
    return get_docs_for_click(obj=command, ctx=context, name="metamoe", title="Commands")


def notebook_page(file: Path) -> str:
    """A notebook's texts, code, and printed output as a page; its pictures are data within it."""
    parts = []
    for cell in json.loads(file.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text") or data.get("text/plain", "")):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _place(file: Path) -> str:
    """Where the site shows a README of examples/."""
    folder = (file.parent if file.name == "README.md" else file).relative_to(_ROOT).as_posix()
    return f"{folder}/index.md" if folder == "examples" else f"{folder}.md"
