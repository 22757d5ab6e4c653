"""The order in which photos were taken, as far as their names tell. Light to import: tasks that only decode use it."""

import re


def name_order(name: str) -> list[str | int]:
    """Key that sorts names by the numbers in them, as photos are counted: ``img_2`` before ``img_10``."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]
