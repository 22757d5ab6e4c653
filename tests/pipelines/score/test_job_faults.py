"""When a job goes on without a process, and when it stops."""

import pytest

from pipelines.score import faults
from pipelines.score.faults import LONGEST_WAIT, SILENCE, TRIES, Faults


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    return now


def test_a_process_that_fails_for_ever_is_started_again_while_another_works(clock):
    job = Faults()
    job.works("actor 1")
    waits = [job.fails("actor 2", "no driver") for _ in range(10)]
    assert waits == sorted(waits)
    assert waits[0] == 5
    assert waits[-1] == LONGEST_WAIT
    assert job.take_news() == ["no driver"]
    assert job.take_news() == []


def test_the_job_stops_when_all_have_failed_several_times(clock):
    job = Faults()
    for process in "abc":
        job.starts(process)
    waits = [job.fails(process, "no driver") for _ in range(TRIES) for process in "abc"]
    assert [wait is None for wait in waits] == [False] * (3 * TRIES - 3) + [True] * 3


def test_a_process_that_still_loads_is_waited_for_but_not_for_ever(clock):
    job = Faults()
    job.starts("slow")
    assert all(job.fails("bad", "no driver") for _ in range(TRIES + 1))
    clock[0] += SILENCE + 1
    assert job.fails("bad", "no driver") is None


def test_one_that_works_again_is_no_failure_any_more(clock):
    job = Faults()
    for _ in range(TRIES - 1):
        job.fails("a", "disk full")
    job.works("a")
    assert job.fails("a", "disk full") == 5
    clock[0] += SILENCE + 1
    job.works("b")
    assert job.fails("a", "disk full") is not None
