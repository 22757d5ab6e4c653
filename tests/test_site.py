"""The documentation site has every page, its links lead somewhere, and its tutorial is the README's flow."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
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


def test_anchors_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            text = (page.parent / target).read_text() if target else page.read_text()
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


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
