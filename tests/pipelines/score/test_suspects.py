"""Images that were at work when a process died; a new `Suspects` stands for the process that is started next."""

import pytest

from pipelines.score import suspects
from pipelines.score.suspects import Suspects


@pytest.fixture(autouse=True)
def note(tmp_path, monkeypatch):
    monkeypatch.setattr(suspects.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "glad-p.json"


def test_a_process_that_ends_its_work_leaves_no_note_and_accuses_nobody(note):
    process = Suspects("p")
    process.note(["a", "b"])
    assert note.exists()
    process.note([])
    assert not note.exists()
    assert not Suspects("p").suspected("a")


def test_who_was_at_work_at_a_death_is_suspected_and_who_was_not_is_not():
    process = Suspects("p")
    process.note(["a", "b"])
    process.note(["b", "c"])
    again = Suspects("p")
    assert [again.suspected(image) for image in "abcd"] == [False, True, True, False]
    assert not any(again.guilty(image) for image in "abcd")
    assert not Suspects("q").suspected("b")


def test_an_image_is_given_up_when_it_was_alone_at_two_deaths():
    Suspects("p").note(["a", "b"])
    for deaths in range(3):
        process = Suspects("p")
        assert process.suspected("a")
        assert process.guilty("a") == (deaths >= 2)
        process.note(["a"])


def test_a_suspect_that_is_judged_after_all_is_cleared(note):
    Suspects("p").note(["a"])
    process = Suspects("p")
    process.note(["a"])
    process.note(["b"])
    assert not process.suspected("a")
    process.note([])
    assert not note.exists()


def test_without_a_name_nothing_is_written(tmp_path):
    process = Suspects(None)
    process.note(["a"])
    assert not process.suspected("a")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_note_and_a_note_that_was_cut_off_accuse_nobody(note):
    note.with_suffix(".new").mkdir()  # so that no note can be written
    Suspects("p").note(["a"])
    assert not note.exists()
    note.write_text('{"deaths": {"a"')
    assert not Suspects("p").suspected("a")
