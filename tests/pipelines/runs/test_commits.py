"""Commits: whatever order pieces come in, whoever is killed, every image counts once."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.storage import StorageError
from glad_core.errors import GladError
from pipelines.runs.commits import (
    Plan,
    Written,
    claim,
    commit_shards,
    make_plan,
    read_commits,
    read_plan,
    release,
    sweep,
)
from pipelines.runs.run import Run
from pipelines.runs.write import complete

IDENTITY = {"source": "/photos", "seed": 0, "models": {"": "abc"}}


def plan_of(images: int) -> Plan:
    return Plan(images, duplicates=0, rows_per_shard=4, run="r", listed=(images,))


def test_the_same_command_resumes_and_another_one_is_refused_with_the_difference(tmp_path):
    run = Run.at(str(tmp_path / "out"))
    assert claim(run, IDENTITY, overwrite=False) == "new"
    assert claim(run, IDENTITY, overwrite=False) == "resumed"
    with pytest.raises(GladError, match=r"another run \(seed was 0, now 1\).*--overwrite"):
        claim(run, IDENTITY | {"seed": 1}, overwrite=False)
    with pytest.raises(GladError, match=r'models was \{"": "abc"\}, now \{"": "xyz"\}'):
        claim(run, IDENTITY | {"models": {"": "xyz"}}, overwrite=False)
    (tmp_path / "out" / "mine.txt").write_text("keep")
    complete(run, {"counts": {"scored": 0, "errors": 0}})
    assert claim(run, IDENTITY, overwrite=False) == "complete"
    assert claim(run, IDENTITY | {"seed": 1}, overwrite=True) == "new"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine.txt", "started.json"]
    release(run)
    assert claim(run, IDENTITY, overwrite=False) == "new"


def test_a_folder_of_results_that_nobody_claimed_is_left_alone(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(GladError, match=r"not started by `glad score`: results.*--overwrite"):
        claim(Run.at(str(tmp_path)), IDENTITY, overwrite=False)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/glad-out"):
        with pytest.raises(StorageError, match=r"in the way|cannot be written"):
            claim(Run.at(str(out)), IDENTITY, overwrite=False)


@pytest.mark.parametrize(("images", "rows"), [(1, 8), (500, 8), (1000, 16), (10_000, 128), (10**6, 512)])
def test_shards_grow_with_the_archive_and_divide_a_manifest_file(tmp_path, images, rows):
    listed = [images // 3, images - images // 3]
    plan = make_plan(Run.at(str(tmp_path)), listed, 3, manifest_rows=512)
    assert plan.rows_per_shard == rows
    assert 512 % rows == 0
    assert sum(plan.rows_of(shard) for shard in range(plan.shards)) == images
    assert read_plan(Run.at(str(tmp_path))) == plan
    assert plan.listed == tuple(listed)


def test_missing_shards_come_in_stretches_of_whole_shards():
    plan = plan_of(45)
    assert plan.stretches(set(), 16) == [(0, 16), (16, 32), (32, 45)]
    assert plan.stretches({1, 2, 4}, 16) == [(0, 4), (12, 16), (20, 32), (32, 45)]
    assert plan.stretches(set(range(12)) - {11}, 16) == [(44, 45)]
    assert plan.stretches(set(range(12)), 16) == []


@given(st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_killed_at_any_moment_any_number_of_times_every_shard_is_committed_once(tmp_path_factory, data):
    dest = tmp_path_factory.mktemp("dest")
    run = Run.at(str(dest))
    plan = plan_of(data.draw(st.integers(1, 30)))
    for attempt in range(10):
        done = read_commits(run)
        todo = [position for position in range(plan.images) if position // 4 not in done]
        # Tasks write any consecutive stretch of what is left, and are reported in any order.
        cuts = sorted(data.draw(st.sets(st.integers(0, len(todo)), max_size=6)) | {0, len(todo)})
        pieces = []
        for first, last in pairwise(cuts):
            for shard in sorted({position // 4 for position in todo[first:last]}):
                rows = [position for position in todo[first:last] if position // 4 == shard]
                file = f"results/part-{shard}-{attempt}-{first}"
                Path(dest, "results").mkdir(exist_ok=True)
                Path(dest, file).write_text(" ".join(map(str, rows)))
                pieces.append(Written(shard, len(rows), 0, 0, (file,)))
        pieces = data.draw(st.permutations(pieces))
        killed_after = data.draw(st.integers(0, len(pieces)))
        for place, _ in enumerate(commit_shards(run, plan, pieces)):
            if place == killed_after:
                break
        if len(read_commits(run)) == plan.shards:
            break
    else:
        list(commit_shards(run, plan, []))
        return  # killed ten times; the next attempt would go on
    sweep(run, read_commits(run).values())
    written = sorted(int(n) for file in Path(dest, "results").iterdir() for n in file.read_text().split())
    assert written == list(range(plan.images))


def test_a_shard_another_driver_has_committed_keeps_that_commit(tmp_path):
    run, plan = Run.at(str(tmp_path)), plan_of(4)
    theirs, ours = Written(0, 3, 1, 1, ("results/theirs",)), Written(0, 4, 0, 0, ("results/ours",))
    assert [commit for _, commit in commit_shards(run, plan, [theirs])] == [theirs]
    assert [commit for _, commit in commit_shards(run, plan, [ours])] == [theirs]
    assert read_commits(run) == {0: theirs}
    (tmp_path / "results").mkdir()
    for name in ("theirs", "ours", ".ours.1.part"):
        (tmp_path / "results" / name).write_text("")
    assert sweep(run, [theirs]) == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["theirs"]
