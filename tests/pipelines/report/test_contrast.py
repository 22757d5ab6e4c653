"""The report's texts and lines stand out from their backgrounds (WCAG AA), in light, dark and printed pages."""

import re

import pytest

from pipelines.report.page import TEMPLATES

CSS = (TEMPLATES / "report.css").read_text()
TEXT = [(ink, ground) for ink in ("ink", "muted", "bad", "good", "miss", "warn") for ground in ("bg", "card")]
TEXT += [("muted", "sunk"), *((kind, f"{kind}-soft") for kind in ("bad", "good", "miss", "warn"))]
DRAWN = [("bar", "card"), ("focus", "card"), ("focus", "bg")]


def colours(start):
    block = CSS[CSS.index(start) :]
    return dict(re.findall(r"--([a-z-]+): #([0-9a-f]{3,6});", block[: block.index("}")]))


LIGHT = colours(":root {")
THEMES = {
    "light": LIGHT,
    "dark": colours(':root[data-theme="dark"]'),
    "dark by the system": colours(':root:not([data-theme="light"])'),
    "print": LIGHT | colours(":root, :root[data-theme]"),
}


def luminance(colour):
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", THEMES)
def test_contrast(theme):
    colour = THEMES[theme]
    for pairs, least in ((TEXT, 4.5), (DRAWN, 3.0)):
        for one, other in pairs:
            low, high = sorted((luminance(colour[one]), luminance(colour[other])))
            assert (high + 0.05) / (low + 0.05) >= least, f"--{one} on --{other}"


def test_the_dark_theme_is_the_same_by_button_and_by_system():
    assert THEMES["dark"] == THEMES["dark by the system"]
