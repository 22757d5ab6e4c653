"""The documentation site has every page, its links lead somewhere, and its tutorial is the README's flow."""

import re
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
MARKDOWN = MarkdownIt("commonmark").enable("table")  # Rich brings it
HOOKS = runpy.run_path(str(ROOT / "docs/site_pages.py"))


def nav():
    text = re.sub(r"format: !!python/name:.*}", "}", (ROOT / "mkdocs.yml").read_text())
    return [page for section in yaml.safe_load(text)["nav"] for pages in section.values() for page in pages]


def test_every_page_is_in_the_navigation():
    pages = {file.name for file in (ROOT / "docs").glob("*.md")} | set(HOOKS["FROM_ROOT"])
    assert sorted(nav()) == sorted(pages)


@pytest.mark.parametrize(
    ("written", "moved"),
    [
        ("[a](docs/training.md#x) ![b](docs/demo.png)", "[a](training.md#x) ![b](demo.png)"),
        ("[c](CONTRIBUTING.md), [d](LICENSE)", "[c](CONTRIBUTING.md), [d](../LICENSE)"),
        ("[e](https://ray.io) [f](#here)", "[e](https://ray.io) [f](#here)"),
    ],
)
def test_links_of_the_readme_as_from_within_docs(written, moved):
    assert HOOKS["moved"](written) == moved


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[file](../LICENSE)", "file (`LICENSE`)"),
        ("[dead](../no-such-file)", "[dead](../no-such-file)"),
        ("[page](training.md)", "[page](training.md)"),
        ("[first](../README.md#on-s3)", "[first](index.md#on-s3)"),
        ("[book](detector.ipynb)", "book (`detector.ipynb`)"),
    ],
)
def test_what_only_the_checkout_has_is_named_and_dead_links_stay(written, shown):
    assert HOOKS["on_page_markdown"](written) == shown


def anchors(text):
    """Those that lead to a heading both where code is browsed (GitHub's rule) and on the site (Python-Markdown's)."""
    tokens = MARKDOWN.parse(text)
    kinds = [Counter(), Counter()]
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            words = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
            plain = re.sub(r"[^\w\s-]", "", words.lower()).strip()
            kinds[0][re.sub(r"\s", "-", plain)] += 1
            kinds[1][re.sub(r"[-\s]+", "-", plain.encode("ascii", "ignore").decode())] += 1
    # Of two headings of one name the two rules number the second in different ways, so it has no anchor.
    return kinds[0].keys() & kinds[1].keys()


def links(tokens):
    for token in tokens:
        yield from (str(token.attrs[name]) for name in ("href", "src") if name in token.attrs)
        if token.type in ("html_block", "html_inline"):
            yield from re.findall(r"""\s(?:href|src)\s*=\s*["']?([^"'\s>]+)""", token.content)
        yield from links(token.children or ())


def dead(page, root):
    """Links of a page, relative ones, that lead to no file within ``root`` or to no heading."""
    for link in links(MARKDOWN.parse(page.read_text())):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        is_there = target.exists() and target.is_relative_to(root)
        wants = unquote(parts.fragment)
        if not is_there or (wants and (target.suffix != ".md" or wants not in anchors(target.read_text()))):
            yield link


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{f.name}" for f in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page):
    assert list(dead(ROOT / page, ROOT)) == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "[a](gone.md) ![b](gone.png) [c](other.md#gone) [d](#gone)",
            ["gone.md", "gone.png", "other.md#gone", "#gone"],
        ),
        ("[a](other.md) [b](other.md#a-heading) [c](#its-own) [d](https://gone.example/x) [e](mailto:x@y.z)", []),
        (
            "[a][one] and <a href='gone.html'>b</a>\n\n<img src=gone.gif>\n\n[one]: gone.txt",
            ["gone.txt", "gone.html", "gone.gif"],
        ),
        ("`[a](gone.md)`\n\n```\n[b](gone.md)\n```", []),
        ("[a](../outside.md) [b](/other.md) [c](<with blank.md>) [d](with%20blank.md)", ["../outside.md", "/other.md"]),
        ("[a](other.md#twice) [b](other.md#twice-1)", ["other.md#twice-1"]),
        ("[a](other.md#cause--effect) [b](picture.png#x)", ["other.md#cause--effect", "picture.png#x"]),
        ("| a |\n|---|\n| [b](gone.md) |", ["gone.md"]),
    ],
)
def test_dead_links_are_found_however_they_are_written(tmp_path, written, expected):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.md").write_text("")
    for name in ("other.md", "with blank.md", "picture.png"):
        (root / name).write_text("# A `heading`!\n\n## Twice\n\n## Twice\n\n## Cause & effect\n")
    (root / "page.md").write_text(f"## Its own\n\n{written}\n")
    assert list(dead(root / "page.md", root)) == expected


def test_the_tutorial_goes_the_readmes_way():
    """`tests/integration/test_readme.py` runs the README's lines, `tests/pipelines/export` the exports."""
    block = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
    readme, tutorial, exports = (
        "".join(block.findall((ROOT / page).read_text())).splitlines()
        for page in ("README.md", "docs/tutorial.md", "docs/exports.md")
    )
    own = [line for line in tutorial if line not in readme]
    assert [line for line in tutorial if line in readme] == readme
    assert [line.replace(" --coco", "") for line in own] == [line for line in exports if line.endswith("--out meeting")]
