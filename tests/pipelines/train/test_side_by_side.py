import io

import pytest
from rich.console import Console

from cluster.storage import StorageError
from glad_core.errors import GladError
from pipelines.train import side_by_side
from pipelines.train.side_by_side import run_side_by_side, send_event


def test_a_job_that_fails_leaves_the_others_alone(ray_session) -> None:
    def succeed(events):
        send_event(events, "good", "train", done=2, total=5, note="loss 0.5")
        send_event(events, "good", "train", warning="a.png: damaged; skipped")
        return 7

    def fail(error):
        def job(events):
            raise error

        return job

    jobs = {"good": succeed, "bad": fail(GladError("no images")), "away": fail(StorageError("no such bucket"))}
    log = io.StringIO()
    outcomes = run_side_by_side(jobs, 2, Console(file=log, width=200))
    assert outcomes["good"] == 7
    # The user's errors come back as they were raised, not inside Ray's.
    assert (type(outcomes["bad"]), str(outcomes["bad"])) == (GladError, "no images")
    assert (type(outcomes["away"]), str(outcomes["away"])) == (StorageError, "no such bucket")
    assert "good: train 2 of 5, loss 0.5\n" in log.getvalue()
    assert "good: a.png: damaged; skipped\n" in log.getvalue()
    assert "bad: failed\n" in log.getvalue()


def test_a_log_has_a_line_per_change_of_state_and_one_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(side_by_side.time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    pace = side_by_side.Pace()
    lines = side_by_side._Lines(Console(file=log, width=200), pace)
    for seconds, name, state, done in (
        (0, "nut", "survey", 0),
        (1, "nut", "train", 1),
        (2, "bolt", "train", 1),
        (3, "nut", "train", 2),
        (12, "nut", "train", 3),
        (13, "nut", "calibrate", 0),
        (14, "nut", "calibrate", 1),
        (30, "nut", "calibrate", 8),
    ):
        clock[0] = 100.0 + seconds
        total = 90 if state == "calibrate" else 9 if done else 0
        event = {"job": name, "state": state, "done": done, "total": total, "note": ""}
        assert pace.expected(event) == ""  # three steps have not been measured
        lines.show(event)
    assert log.getvalue().splitlines() == [
        "nut: survey",
        "nut: train 1 of 9",
        "bolt: train 1 of 9",
        "nut: train 3 of 9, 0:00:33 left",
        "nut: calibrate 0 of 90",
        "nut: calibrate 8 of 90",  # eight at a time tell no pace
    ]


@pytest.mark.parametrize(
    ("state", "total", "steps", "expected"),
    [
        # (done, seconds) of each event, and what is said at which of them
        ("train", 600, [(1, 0), (3, 2), (5, 6), (9, 7), (600, 900)], {2: "600 steps, about 15 minutes"}),
        ("train", 600, [(1, 0), (2, 50), (4, 150)], {2: "600 steps, about 8.3 hours"}),
        ("train", 600, [(201, 0), (301, 10), (600, 40)], {1: "399 of 600 steps, about 40 seconds"}),
        ("calibrate", 348, [(0, 0), (8, 9), (40, 10)], {2: f"348 {side_by_side.JUDGE[1]} 90 seconds"}),
        ("train", 5, [(1, 0), (5, 4)], {}),  # over before it is measured
        ("survey", 0, [(0, 0), (0, 60)], {}),
    ],
)
def test_how_long_it_takes_is_said_once_it_is_measured(state, total, steps, expected, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(side_by_side.time, "monotonic", lambda: clock[0])
    pace, said = side_by_side.Pace(), {}
    for number, (done, clock[0]) in enumerate(steps):
        if line := pace.expected({"job": "nut", "state": state, "done": done, "total": total}):
            said[number] = line
    assert said == expected


def test_a_bar_stays_full_after_states_that_count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    events = [
        {"state": "calibrate", "done": 348, "total": 348, "outcome": None},
        {"state": "deliver", "done": 0, "total": 0, "outcome": None},
        {"state": "done", "done": 0, "total": 0, "outcome": 7},
    ]
    sent = [{"job": "nut", "note": "", "warning": ""} | event for event in events]
    monkeypatch.setattr(side_by_side, "_run_all", lambda jobs, parallel: sent)
    run_side_by_side({"nut": lambda events: 7}, 1, Console(file=shown, force_terminal=True, width=120))
    assert "348/348" in next(line for line in reversed(shown.getvalue().splitlines()) if "nut" in line)


@pytest.mark.parametrize(
    ("latest", "jobs", "note"),
    [
        ({"a": {"state": "train", "done": 2, "total": 5}}, 1, "after step 2 of 5"),
        ({"a": {"state": "survey", "done": 0, "total": 0}}, 1, "at survey"),
        ({"a": {"state": "done"}, "b": {"state": "failed"}, "c": {"state": "train"}}, 4, "after 2 of 4 categories"),
    ],
)
def test_a_stop_learns_how_far_the_jobs_are(latest, jobs, note) -> None:
    with pytest.raises(KeyboardInterrupt) as stop, side_by_side._says_how_far(latest, jobs):
        raise KeyboardInterrupt
    assert stop.value.__notes__ == [note]
