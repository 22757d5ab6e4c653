import numpy as np

from pipelines.demo.bare_board import BENCH, OUTLINE, bare_board
from pipelines.demo.components import CANVAS, GOLD, LAYOUT, WHITE


def test_a_missing_component_shows_an_outline_and_pads() -> None:
    board = np.asarray(bare_board())
    assert board.shape == (CANVAS, CANVAS, 3)
    for part in LAYOUT:
        box = board[
            part.y - part.height // 2 - 6 : part.y + part.height // 2 + 6,
            part.x - part.width // 2 - 6 : part.x + part.width // 2 + 6,
        ]
        for colour in (WHITE, GOLD):
            assert (box == colour).all(axis=2).any(), part.kind


def test_the_bench_shows_around_the_board() -> None:
    board = np.asarray(bare_board())
    assert (board[: OUTLINE[1]] == BENCH).all()
    assert (board[:, OUTLINE[2] + 1 :] == BENCH).all()
