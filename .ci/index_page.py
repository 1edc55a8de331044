"""Makes README.md readable on a package index's page, in the checkout that a release is built from::

    python .ci/index_page.py https://github.com/OWNER/int8fx v0.1.0

A package index shows the page without the repository's files. So links and images that name such a file
become its address at the tag. ``pyproject.toml`` gets the repository's addresses, which the index lists
beside the page.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def with_addresses(page: str, repository: str, tag: str) -> str:
    """A page whose links to files are absolute.

    Raises:
        FileNotFoundError: a link names a file that the repository does not have.
    """

    def absolute(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path = target.partition("#")[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"README.md links to {path}, which is not there")
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/{tag}/{target})"

    return LINK.sub(absolute, page)


def with_urls(project: str, repository: str) -> str:
    """``pyproject.toml`` with the addresses that an index lists."""
    urls = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }
    lines = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
    table = "[project.urls]\n"
    assert table in project, "pyproject.toml has no table [project.urls]"
    return project.replace(table, table + lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: index_page.py REPOSITORY TAG")
    repository, tag = sys.argv[1].rstrip("/"), sys.argv[2]
    page, project = ROOT / "README.md", ROOT / "pyproject.toml"
    page.write_text(with_addresses(page.read_text(), repository, tag))
    project.write_text(with_urls(project.read_text(), repository))
