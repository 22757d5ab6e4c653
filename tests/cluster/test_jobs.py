from types import SimpleNamespace

import pytest

from cluster.jobs import full_id
from cluster.session import SessionError

IDS = ["raysubmit_abcd", "raysubmit_abxy", "other"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("raysubmit_abc", IDS[0]), ("abx", IDS[1]), ("raysubmit_abcd", IDS[0]), ("oth", "other"), ("nothing", "nothing")],
)
def test_a_job_is_named_by_how_its_id_begins(given, meant):
    client = SimpleNamespace(list_jobs=lambda: [SimpleNamespace(submission_id=name) for name in [*IDS, None]])
    assert full_id(client, given) == meant


def test_a_beginning_of_several_ids_names_them():
    client = SimpleNamespace(list_jobs=lambda: [SimpleNamespace(submission_id=name) for name in IDS])
    with pytest.raises(SessionError, match="2 jobs begin with ab: raysubmit_abcd, raysubmit_abxy; give more of the id"):
        full_id(client, "ab")
