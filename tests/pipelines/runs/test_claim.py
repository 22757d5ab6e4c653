"""Who may write a run folder."""

import json
from dataclasses import replace

import pytest

from cluster.storage import Storage, StorageError
from glad_core.errors import GladError
from pipelines.runs.claim import Found, check_in_force, claim, draft, find, find_own, repair
from pipelines.runs.run import Run

IDENTITY = {"source": "/photos", "seed": 0, "models": {"": "abc"}}


def claimed(run, generation=1, identity=IDENTITY, listed=(20,)):
    """Claim the folder after a listing of one file."""

    def prepare(listing):
        run.storage.write(run.path("manifest", listing, "part-0.parquet"), b"")
        return draft(listed, listing, None, identity, most_rows=512)

    return claim(run, generation, prepare)


def test_the_same_command_resumes_and_another_one_is_refused_with_the_difference(tmp_path):
    run = Run.at(str(tmp_path / "out"))
    assert find_own(run, IDENTITY, overwrite=False) == Found(0, None)
    plan = claimed(run)
    assert find_own(run, IDENTITY, overwrite=False) == Found(1, plan)
    with pytest.raises(GladError, match=r"another run \(seed was 0, now 1\).*--overwrite"):
        find_own(run, IDENTITY | {"seed": 1}, overwrite=False)
    with pytest.raises(GladError, match=r'models was \{"": "abc"\}, now \{"": "xyz"\}'):
        find_own(run, IDENTITY | {"models": {"": "xyz"}}, overwrite=False)
    assert find_own(run, IDENTITY | {"seed": 1}, overwrite=True) == Found(1, None)
    check_in_force(run, plan)
    newer = claimed(run, 2, IDENTITY | {"seed": 1})
    assert find(run) == Found(2, newer)
    with pytest.raises(GladError, match="another command has begun anew"):
        check_in_force(run, plan)


def test_of_two_commands_that_claim_at_once_the_first_holds(tmp_path):
    run = Run.at(str(tmp_path / "out"))
    first = claimed(run)
    assert claimed(run) == first
    with pytest.raises(GladError, match="another run has just started writing there"):
        claimed(run, 1, IDENTITY | {"seed": 1})
    assert find(run).plan == first
    assert [path.name for path in (tmp_path / "out/manifest").iterdir()] == [first.listing]


def test_a_repaired_shard_has_a_commit_of_its_generation(tmp_path):
    run = Run.at(str(tmp_path / "out"))
    plan = claimed(run)
    assert plan.commit_names() == ["00000000.json", "00000001.json", "00000002.json"]
    repaired = repair(run, repair(run, plan, [1]), [1, 2])
    assert (repaired.run, repaired.generation, repaired.base) == (plan.run, 3, 1)
    assert repaired.commit_names() == ["00000000.json", "00000001.3.json", "00000002.3.json"]
    assert find(run).plan == repaired


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"images": 3}', b"\xff\xfe", b'{"run": ' * 5000])
def test_a_damaged_plan_is_one_line_and_can_be_overwritten(tmp_path, content):
    run = Run.at(str(tmp_path))
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(GladError, match=r"plan.json: damaged.*--overwrite"):
        find_own(run, IDENTITY, overwrite=False)
    assert find_own(run, IDENTITY, overwrite=True) == Found(1, None)
    assert claimed(run, 2).generation == 2


def test_a_plan_that_was_deleted_alone_is_told(tmp_path):
    (tmp_path / "commits").mkdir()
    for overwrite in (False, True):
        with pytest.raises(GladError, match=r"plan.json has been deleted, but not the rest.*delete "):
            find_own(Run.at(str(tmp_path)), IDENTITY, overwrite)


def test_a_folder_of_results_that_nobody_claimed_is_left_alone(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(GladError, match=r"not started by `glad score`: results.*--overwrite"):
        find_own(Run.at(str(tmp_path)), IDENTITY, overwrite=False)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="in the way"):
        find_own(Run.at(str(tmp_path / "file")), IDENTITY, overwrite=False)
    for out in (tmp_path / "file" / "sub", "/proc/glad-out"):
        with pytest.raises(StorageError, match=r"in the way|no such file"):
            claimed(Run.at(str(out)))


@pytest.mark.parametrize(("images", "rows"), [(1, 8), (500, 8), (1000, 16), (10_000, 128), (10**6, 512)])
def test_shards_grow_with_the_archive_and_divide_a_manifest_file(tmp_path, images, rows):
    listed = [images // 3, images - images // 3]
    plan = claimed(Run.at(str(tmp_path)), listed=listed)
    assert plan.rows_per_shard == rows
    assert 512 % rows == 0
    assert sum(plan.rows_of(shard) for shard in range(plan.shards)) == images
    assert json.loads((tmp_path / "plan.json").read_text())["listed"] == listed
    assert find(Run.at(str(tmp_path))).plan == plan


def test_missing_shards_come_one_by_one():
    plan = replace(draft([45], "listing", None, IDENTITY, 512), rows_per_shard=16)
    assert (plan.missing(set()), plan.missing({1}), plan.missing({0, 1, 2})) == ([0, 1, 2], [0, 2], [])
    assert [plan.rows_of(shard) for shard in range(3)] == [16, 16, 13]


def test_a_run_grows_by_listings_with_shards_of_their_own(tmp_path):
    run = Run.at(str(tmp_path))
    first = claimed(run, listed=(9,))
    grown = claim(run, 2, lambda listing: first.grown([0, 1000], listing, 512), first.base)
    grown = claim(run, 3, lambda listing: grown.grown([3], listing, 512), grown.base)
    assert find(run).plan == grown
    assert (grown.images, grown.run, grown.generation, grown.base) == (1012, first.run, 3, 1)
    assert [listing.shards for listing in grown.listings] == [2, 63, 1]
    places = [(grown.listings.index(listing), first) for listing, first in map(grown.place_of, range(grown.shards))]
    assert places == [(0, 0), (0, 8), *((1, 16 * shard) for shard in range(63)), (2, 0)]
    assert [grown.rows_of(shard) for shard in (0, 1, 2, 64, 65)] == [8, 1, 16, 8, 3]
    assert sum(map(grown.rows_of, range(grown.shards))) == grown.images
    assert grown.commit_names()[:2] == first.commit_names()  # what is committed stays


def test_of_two_jobs_that_add_at_once_the_first_holds_and_the_other_s_listing_is_deleted(tmp_path):
    run = Run.at(str(tmp_path))
    first = claimed(run)

    def add(count):
        def prepare(listing):
            run.storage.write(run.path("manifest", listing, "part-0.parquet"), b"")
            return first.grown([count], listing, 512)

        return claim(run, 2, prepare, first.base)

    grown = add(5)
    assert add(7) == grown
    kept = {path.name for path in (tmp_path / "manifest").iterdir()}
    assert kept == {listing.name for listing in grown.listings}


@pytest.mark.parametrize("last", [1, 2, 3, 7, 64, 100])
def test_the_newest_of_many_generations_is_found_without_reading_all(tmp_path, last, monkeypatch):
    run = Run.at(str(tmp_path))
    plan = claimed(run)
    for generation in range(2, last + 1):
        plan = claim(run, generation, lambda listing: plan.grown([1], listing, 512), plan.base)  # noqa: B023
    reads, read_all = [], Storage.read_all
    monkeypatch.setattr(Storage, "read_all", lambda *args: reads.append(args) or read_all(*args))
    assert find(run) == Found(last, plan)
    assert len(reads) <= 30
