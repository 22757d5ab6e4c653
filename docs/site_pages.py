"""Hooks of mkdocs: the site's first page is README.md, and links to files that are no pages become their names."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/, as they would be written in it."""
    from mkdocs.structure.files import File

    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=moved(ROOT.joinpath(source).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to what only the checkout has become its name; others stay, so that mkdocs finds the dead ones."""

    def named(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        is_elsewhere = target.startswith("../") or target.endswith((".ipynb", ".py"))
        return (
            f"{text} (`{target.removeprefix('../')}`)"
            if is_elsewhere and (ROOT / "docs" / target).exists()
            else link[0]
        )

    return LINK.sub(named, markdown.replace("](../README.md", "](index.md"))


def moved(markdown: str) -> str:
    """Text from beside docs/ with its links and pictures as from within: docs/X is X, X is ../X."""
    pages = {source: page for page, source in FROM_ROOT.items()}

    def target(link: re.Match[str]) -> str:
        path = link[1]
        if path.startswith(("http://", "https://")):
            return link[0]
        inside = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return f"]({pages.get(path, inside)}{link[2] or ''})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)]*)?\)", target, markdown)
