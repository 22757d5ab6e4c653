"""Components of the demo's board: all can be drawn, lie on the board and do not hide each other."""

from itertools import combinations

import numpy as np
import pytest

from pipelines.demo.boards import MISTAKEN_FOR
from pipelines.demo.components import BOXES, DRAW, LAYOUT, part_picture


@pytest.mark.parametrize("kind", sorted(DRAW))
def test_a_picture_fills_its_box_and_is_clear_around_the_component(kind: str) -> None:
    picture = part_picture(kind)
    assert picture.size == BOXES[kind]
    alpha = np.asarray(picture.getchannel("A"))
    assert set(np.unique(alpha)) <= {0, 255}
    assert (alpha > 0).mean() > 0.3
    assert alpha.any(axis=0).mean() > 0.9
    assert alpha.any(axis=1).mean() > 0.9


def test_components_do_not_overlap() -> None:
    for one, other in combinations(LAYOUT, 2):
        across, down = abs(one.x - other.x), abs(one.y - other.y)
        assert 2 * across >= one.width + other.width or 2 * down >= one.height + other.height, (one, other)


def test_every_component_has_something_it_may_be_mistaken_for_that_can_be_drawn() -> None:
    for kind, others in MISTAKEN_FOR.items():
        assert kind in {part.kind for part in LAYOUT}
        assert kind not in others
        assert set(others) <= set(DRAW)
