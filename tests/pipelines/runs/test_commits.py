"""Commits on a real disk: damaged books are noticed and mended. `tests/simulation` has the adversary."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from glad_core.errors import GladError
from pipelines.runs.claim import Plan, claim, draft, find
from pipelines.runs.commits import Written, commit_shards, complete, is_complete, read_commits, recover
from pipelines.runs.run import Run
from pipelines.runs.write import new_staging, part_name

IMAGES = 20  # in three shards
RECORD = {"counts": {"scored": IMAGES, "errors": 0}}


def start(folder: Path, seed: int = 0, generation: int = 1) -> tuple[Run, Plan]:
    run = Run.at(str(folder))
    return run, claim(run, generation, lambda listing: draft([IMAGES], listing, None, {"seed": seed}, 512))


def stage(run: Run, plan: Plan, shard: int) -> Written:
    """One shard as a writer stages it: its positions, in a file of results."""
    staged, rows = new_staging(plan.generation), plan.rows_of(shard)
    file = f"results/{part_name(shard, plan.generation)}"
    data = " ".join(str(shard * plan.rows_per_shard + row) for row in range(rows)).encode()
    run.storage.write(run.path(staged, file), data)
    return Written(shard, rows, 0, 0, staged, (file,), (len(data),))


def score(run: Run, plan: Plan, shards=None) -> tuple[Plan, dict[int, Written]]:
    """Do what a job does; only these shards of what is missing."""
    plan, commits = recover(run, plan)
    missing = sorted(set(range(plan.shards)) - commits.keys())
    pieces = (stage(run, plan, shard) for shard in missing if shards is None or shard in shards)
    commits |= {commit.shard: commit for _, commit in commit_shards(run, plan, pieces) if commit is not None}
    return plan, commits


def finish(run: Run, plan: Plan) -> Plan:
    plan, commits = score(run, plan)
    complete(run, plan, commits, RECORD)
    assert is_complete(run, plan)
    assert positions(run) == list(range(IMAGES))
    return plan


def positions(run: Run) -> list[int]:
    return sorted(int(n) for file in Path(run.path("results")).rglob("*.parquet") for n in file.read_text().split())


def test_a_run_that_was_stopped_goes_on_after_its_last_commit(tmp_path):
    run, plan = start(tmp_path)
    assert not is_complete(run, plan)
    score(run, plan, shards=[1])
    assert list(read_commits(run, plan)) == [1]
    kept = {path: path.read_bytes() for path in (tmp_path / "commits").iterdir()}
    finish(run, plan)
    assert kept.items() <= {path: path.read_bytes() for path in (tmp_path / "commits").iterdir()}.items()
    assert not list((tmp_path / "staging").iterdir())
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["run"], record["generation"], record["files"]["results"]["files"]) == (plan.run, 1, 3)
    before = (tmp_path / "run.json").read_bytes()
    complete(run, plan, read_commits(run, plan), RECORD | {"seconds": 5})  # a second driver, at its end
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_shard_another_driver_has_committed_keeps_that_commit(tmp_path):
    run, plan = start(tmp_path)
    theirs, ours = stage(run, plan, 0), stage(run, plan, 0)
    assert [commit for _, commit in commit_shards(run, plan, [theirs])] == [theirs]
    assert [commit for _, commit in commit_shards(run, plan, [ours])] == [theirs]
    assert read_commits(run, plan) == {0: theirs}
    finish(run, plan)


def test_a_driver_that_was_stopped_for_long_cannot_change_a_complete_run(tmp_path):
    run, plan = start(tmp_path)
    late = commit_shards(run, plan, (stage(run, plan, shard) for shard in range(3)))
    next(late)
    finish(run, plan)
    assert list(late) == []  # it notices that the run is complete, and ends
    assert positions(run) == list(range(IMAGES))


def test_a_driver_whose_run_was_overwritten_cannot_write_into_the_new_one(tmp_path):
    run, plan = start(tmp_path)
    late = commit_shards(run, plan, (stage(run, plan, shard) for shard in range(3)))
    next(late)
    _, newer = start(tmp_path, seed=1, generation=2)
    finish(run, newer)
    with pytest.raises(GladError, match="another command has begun anew"):
        next(late)
    assert positions(run) == list(range(IMAGES))
    assert json.loads((tmp_path / "run.json").read_text())["run"] == newer.run


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_run(path: Path) -> None:
    path.write_text(path.read_text().replace('"run": "', '"run": "x'))


def leads_outside(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": ["results/../../part-0.parquet"]}))


@pytest.mark.parametrize("complete_before", [False, True])
@pytest.mark.parametrize(
    ("pattern", "damage"),
    [("commits/*0.json", damage) for damage in (empty, cut, of_another_run, leads_outside, Path.unlink)]
    + [("results/part-00000000-*", damage) for damage in (empty, cut, Path.unlink)]
    + [("run.json", damage) for damage in (empty, cut, Path.unlink)]
    + [("record.json", damage) for damage in (empty, cut, Path.unlink)],
)
def test_damaged_books_and_results_are_mended_by_the_same_command(tmp_path, pattern, damage, complete_before):
    run, plan = start(tmp_path)
    if complete_before:
        finish(run, plan)
    else:
        score(run, plan, shards=[0, 1])
    for path in list(tmp_path.glob(pattern)):
        damage(path)
    finish(run, find(run).plan)


def test_foreign_files_among_the_books_are_left_alone(tmp_path):
    run, plan = start(tmp_path)
    score(run, plan, shards=[0])
    foreign = ["commits/Thumbs.db", "commits/0.json", "commits/x.json", "results/notes.txt", "staging/mine/x", "mine"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    finish(run, plan)
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    _, newer = start(tmp_path, seed=1, generation=2)
    finish(run, newer)
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)


def test_a_folder_of_an_older_version_can_be_overwritten(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "commits").mkdir()
    for name in ("plan.json", "started.json", "run.json", "commits/00000000.json"):
        (tmp_path / name).write_text('{"shard": 0}')
    (tmp_path / "results/part-00000000-12345678-0123456789abcdef.parquet").write_text("99")
    run, plan = start(tmp_path, generation=2)
    finish(run, plan)
    assert sorted(path.name for path in (tmp_path / "commits").iterdir()) == [f"0000000{n}.2.json" for n in range(3)]


@pytest.mark.parametrize("order", permutations(range(3)))
def test_a_shard_is_committed_once_every_page_of_its_files_is_there(order, tmp_path):
    """Its rows may come in any pieces: the first pages alone, or the last of a file before its others."""
    run, plan = start(tmp_path)
    files = plan.rows_of(0)
    pieces = []
    for scored, pages in ((files - 1, 1), (2, 1), (3, 2)):  # 8 files, four further pages
        piece = stage(run, plan, 0)
        (file,) = piece.files
        data = run.storage.read(run.path(piece.staged, file))
        run.storage.write(run.path("staging/1-a", file), data)
        pieces.append(replace(piece, staged="staging/1-a", scored=scored, pages=pages, shard_pages=4))
    assert sum(piece.scored for piece in pieces) == files + 4
    outcomes = [commit for _, commit in commit_shards(run, plan, [pieces[index] for index in order])]
    assert outcomes[:2] == [None, None]
    assert outcomes[2] is not None
    assert (outcomes[2].scored, outcomes[2].pages, outcomes[2].done) == (files + 4, 4, files)
    assert read_commits(run, plan) == {0: outcomes[2]}
