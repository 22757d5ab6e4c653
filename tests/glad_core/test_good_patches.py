import re
from dataclasses import replace

import numpy as np
import pytest

from glad_core import good_patches
from glad_core.bundle.model import load_bundle
from glad_core.engine import nearest
from glad_core.good_patches import GoodPicture, blocks_of, remember
from glad_core.name_order import name_order
from glad_core.pictures import score_pictures
from glad_core.views import Frames


@pytest.fixture(scope="module")
def model(tiny_bundle):
    model = load_bundle(tiny_bundle)
    return replace(model, settings=model.settings.judged_by("nearest"))


def pictures_of(model, images, groups=None):
    return [
        GoodPicture(f"{n:03}", group, Frames([f.frame(image) for f in model.settings.framings()], image.shape[:2]))
        for n, (image, group) in enumerate(zip(images, groups or [""] * len(images), strict=True))
    ]


def noise(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def test_blocks_are_neighbours_of_each_group() -> None:
    assert blocks_of([""] * 25) == sorted(blocks_of([""] * 25))
    assert np.bincount(blocks_of([""] * 25)).tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 3, 2]
    assert blocks_of(["a", "a", "b", "b", "b"]) == [0, 5, 0, 3, 6]
    assert blocks_of(["a", "b", "a", "b"]) == [0, 0, 5, 5]


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = ["1.png", "img", "img_2.png", "img_10.png", "img_10b.png", "lot 9/01.png", "lot 9/2.png", "lot 10/1.png"]
    assert sorted(set(names), key=name_order) == names


def test_a_picture_is_judged_by_the_patches_of_other_blocks(model) -> None:
    """Photos in pairs of the same piece: alike, each would be at no distance from the other."""
    pieces = noise(10)
    pictures = pictures_of(model, [piece for piece in pieces for _ in range(2)])
    pictures = [picture._replace(name=f"img_{n}") for n, picture in enumerate(pictures)]  # img_10 follows img_9
    patches = remember(model, pictures[::-1], seed=0)  # of a list in any order
    assert patches.blocks == [block for block in range(10) for _ in range(2)]
    scores = patches.scores(seed=0)
    assert scores.shape == (20, 2)
    assert (scores[::2] == scores[1::2]).all()
    kept = replace(model, memory=patches.memory)
    by_all = score_pictures(kept, [picture.frames for picture in pictures], [""] * 20, [""] * 20, 8, 0)
    assert by_all.max() < 0.1 * scores.min()
    # As if the pair had never been seen.
    apart = remember(model, pictures[2:], seed=0)
    unseen = score_pictures(replace(model, memory=apart.memory), [pictures[0].frames], [""], [""], 8, 0)
    np.testing.assert_allclose(scores[0], unseen[0], rtol=1e-3)


def test_twins_in_different_blocks_are_said(model) -> None:
    """Photos in pairs of the same piece, under names that follow each other, and under names in random order."""
    pictures = pictures_of(model, [piece for piece in noise(20) for _ in range(2)])
    assert remember(model, pictures, seed=0).doubt is None
    order = np.random.default_rng(0).permutation(40)
    mixed = [picture._replace(name=f"lot/{number:02}") for picture, number in zip(pictures, order, strict=True)]
    doubt = remember(model, mixed, seed=0).doubt
    said, such_as = re.match(r"(\d+) of 40 good pictures .*, such as (\d+ and \d+): copies", doubt).groups()
    twins = {frozenset((int(one), int(other))) for one, other in order.reshape(20, 2)}
    assert frozenset(map(int, such_as.split(" and "))) in twins
    blocks = blocks_of([""] * 40)
    assert int(said) == 2 * sum(len({blocks[place] for place in pair}) == 2 for pair in twins)
    # Of fewer pictures every patch has few to be near to.
    assert remember(model, mixed[:38], seed=0).doubt is None


def test_pictures_that_are_not_remembered_are_judged_too(model) -> None:
    pictures = pictures_of(model, noise(6))
    patches = remember(model, [picture._replace(remembered=picture.name < "003") for picture in pictures], seed=0)
    assert set(patches.views[0].blocks_M.tolist()) == set(patches.blocks[:3])
    scores = patches.scores(seed=0)
    unseen = score_pictures(
        replace(model, memory=patches.memory), [picture.frames for picture in pictures[3:]], [""] * 3, [""] * 3, 8, 0
    )
    np.testing.assert_allclose(scores[3:], unseen, rtol=1e-5)


def test_without_patches_of_others_a_picture_is_not_judged(model) -> None:
    first, second = pictures_of(model, noise(2))
    patches = remember(model, [first, second._replace(remembered=False)], seed=0)
    assert [picture.name for picture in patches.pictures] == ["001"]
    assert patches.scores(seed=0).shape == (1, 2)


def test_so_many_pictures_are_judged_as_tiles_allow_and_some_of_each_category(model, monkeypatch) -> None:
    monkeypatch.setattr(good_patches, "SCORED_OF_EACH", 2)
    monkeypatch.setattr(good_patches, "SCORED", 12)
    pictures = pictures_of(model, noise(18), ["a"] * 16 + ["b"] * 2)

    def judged(model):
        patches = remember(model, pictures, seed=0)
        assert patches.tiles() == 2 * len(patches.pictures)
        return [picture.group for picture in patches.pictures]

    assert len(judged(model)) == 12
    several = replace(model, prompts=dict.fromkeys("ab", model.prompt_cond))
    assert judged(several) == ["a"] * 6 + ["b"] * 2
    monkeypatch.setattr(good_patches, "SCORED_TILES", 8)
    assert len(judged(model)) == 4
    assert judged(several) == ["a"] * 2 + ["b"] * 2


def test_patches_of_other_blocks_stand_in_for_those_that_were_remembered_instead_of_them(model, monkeypatch) -> None:
    """Every piece is in two blocks, but each of its patches is remembered once."""
    pieces = noise(10)
    monkeypatch.setattr(nearest, "REMEMBERED", 10 * 16)
    patches = remember(model, pictures_of(model, pieces + pieces), seed=0)
    assert patches.blocks == sorted([*range(10), *range(10)])
    assert len(patches.views[0].memory.patches.unique(dim=0)) == 10 * 16
    scores = patches.scores(seed=0)[:, 0]
    unlike = score_pictures(
        replace(model, memory=patches.memory), [p.frames for p in pictures_of(model, noise(11)[10:])], [""], [""], 8, 0
    )
    assert scores.max() < 0.1 * unlike[0, 0]
