"""What mkdocs needs beside ``docs/``: pages of other folders, and the help of every command.

The repository's READMEs stand beside the code that they describe. Here they become pages of the site,
and links between files become links between pages. A link to a file that is no page becomes its text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
HOME = "index.md"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "passes/README.md",
    "kernels/README.md",
    "tests/README.md",
    "benchmarks/README.md",
    "benchmarks/coverage.md",
)
PICTURES = "benchmarks/figures/*.png"
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!\w+:|#)([^)\s#]*)(#[^)\s]*)?\)")
HELP = "<!-- help of every command -->"


def on_files(files: Files, config: Any) -> Files:
    for name in PAGES:
        content = between_pages((ROOT / name).read_text(), name)
        files.append(File.generated(config, page_of(name), content=content))
    for path in ROOT.glob(PICTURES):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in map(page_of, PAGES):
        return markdown  # rewritten above
    return between_pages(markdown.replace(HELP, command_help()), f"docs/{page.file.src_uri}")


def page_of(name: str) -> str:
    """Where the site has a file of the repository."""
    return HOME if name == "README.md" else name.removeprefix("docs/")


def between_pages(markdown: str, name: str) -> str:
    """The text of a file with its links as the site has them.

    Args:
        name: of the file in the repository.

    Raises:
        FileNotFoundError: a link names a file that the repository does not have.
    """
    here = posixpath.dirname(page_of(name))

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{name} links to {target}, which is not there")
        known = path in PAGES or path.startswith("docs/") or (ROOT / path) in set(ROOT.glob(PICTURES))
        if not known:
            return text
        return f"{image}[{text}]({posixpath.relpath(page_of(path), here or '.')}{anchor or ''})"

    return LINK.sub(link, markdown)


def command_help() -> str:
    """What ``int8fx COMMAND --help`` prints on 80 columns, a section a command."""
    import typer.main
    from typer.testing import CliRunner

    from int8fx.cli.app import app

    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"})
    sections = []
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        shown = runner.invoke(app, [name, "--help"], prog_name="int8fx").output
        text = "\n".join(line.rstrip() for line in shown.splitlines()).strip("\n")
        sections.append(f"### int8fx {name}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)
