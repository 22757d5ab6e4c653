import pytest
import torch

from glad_core.twins import PATCHES, Twins, find_twins


def pieces(count, seed=0):
    """Patches [P, D] of so many unlike pictures, and their owners."""
    patches = torch.randn(count * PATCHES, 8, generator=torch.Generator().manual_seed(seed))
    return patches, torch.arange(count).repeat_interleave(PATCHES)


def test_unlike_pictures_have_no_twins() -> None:
    assert find_twins(*pieces(50), [number // 5 for number in range(50)]) == Twins(50, [])


def test_twins_are_found_in_other_blocks_only() -> None:
    patches, owners = pieces(50)
    noise, _ = pieces(50, seed=1)
    patches[owners == 41] = patches[owners == 3] + 0.01 * noise[owners == 3]  # another photo
    patches[owners == 24] = patches[owners == 10]  # a copy
    patches[owners == 33] = patches[owners == 32]  # in the same block
    found = find_twins(patches, owners, [number // 5 for number in range(50)])
    assert found.looked_at == 50
    assert {frozenset(pair) for pair in found.pairs[:2]} == {frozenset((10, 24))}  # the nearest first
    assert {frozenset(pair) for pair in found.pairs[2:]} == {frozenset((3, 41))}
    assert len(found.pairs) == 4


def test_pictures_that_are_all_alike_have_no_twin() -> None:
    """Such as photos of an empty belt: leaving one of them out changes nothing."""
    patches, owners = pieces(50)
    alike = patches[owners == 0].repeat(50, 1)
    blocks = [number // 5 for number in range(50)]
    assert find_twins(alike, owners, blocks).pairs == []
    assert find_twins(alike + 1e-3 * patches, owners, blocks).pairs == []
    assert find_twins(torch.zeros_like(patches), owners, blocks).pairs == []


def test_with_one_block_or_no_third_picture_there_is_nothing_to_compare_with() -> None:
    assert find_twins(*pieces(4), [0] * 4) == Twins(4, [])
    assert find_twins(*pieces(2), [0, 1]) == Twins(2, [])


@pytest.mark.parametrize(("looked_at", "twins", "said"), [(40, 17, True), (40, 16, False), (39, 39, False)])
def test_many_twins_are_said(looked_at, twins, said) -> None:
    doubt = Twins(looked_at, [(0, 1)] * twins).doubt(["a/1.png", "b/2.png"])
    assert (doubt is not None) == said
    assert not said or doubt.startswith("17 of 40 good pictures looked at have a twin ")
    assert not said or ", such as 1.png and 2.png: " in doubt


def test_pictures_of_the_same_name_are_told_apart_by_their_folders() -> None:
    assert ", such as a/1.png and b/1.png: " in Twins(40, [(0, 1)] * 40).doubt(["a/1.png", "b/1.png"])
