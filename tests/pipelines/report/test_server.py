"""`glad view` serves cards of any search, keeps marks and refuses other hosts."""

import io

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from judged_run import make_judged_run
from rich.console import Console

from glad_core.errors import GladError
from pipelines.report.server import make_app, view
from pipelines.runs import feedback
from pipelines.runs.run import Run


@pytest.fixture
def judged(tmp_path, tiny_bundle):
    return make_judged_run(tmp_path, tiny_bundle)


@pytest.fixture
def client(judged):
    with TestClient(make_app(judged.run), base_url="http://127.0.0.1") as client:
        yield client


def test_cards_of_a_search(client, judged) -> None:
    reply = client.get("/api/cards", params={"count": 3, "verdict": "anomalous"}).json()
    assert reply["total"] == sum(row["is_anomalous"] for row in judged.rows)
    assert [card["anomalous"] for card in reply["cards"]] == [True] * 3
    assert client.get("/api/cards", params={"text": "no such file"}).json()["total"] == 0
    assert client.get("/api/cards", params={"sort": "luck"}).status_code == 422


def test_marks_are_kept_and_taken_back(client, judged) -> None:
    card = client.get("/api/cards", params={"count": 1}).json()["cards"][0]
    mark = {"file": card["file"], "image_id": card["id"], "verdict": "confirmed"}
    assert client.post("/api/marks", json=mark).json() == {"saved": card["id"]}
    (confirmed,) = client.get("/api/cards", params={"mark": "confirmed"}).json()["cards"]
    assert (confirmed["id"], confirmed["mark"]) == (card["id"], "confirmed")
    assert client.get("/api/cards", params={"mark": "unmarked"}).json()["total"] == len(judged.rows) - 1
    (kept,) = feedback.read_marks(judged.run)
    assert (kept["image_id"], kept["verdict"], kept["uri"]) == (card["id"], "confirmed", card["uri"])
    assert client.post("/api/marks", json=mark | {"verdict": None}).status_code == 200
    assert feedback.read_marks(judged.run) == []
    assert client.post("/api/marks", json=mark | {"image_id": "x"}).status_code == 404
    assert client.post("/api/marks", json=mark | {"verdict": "perhaps"}).status_code == 422


def test_marks_of_an_earlier_server_are_shown(judged) -> None:
    row = judged.rows[0]
    feedback.mark(judged.run, row, "false_alarm")
    with TestClient(make_app(judged.run), base_url="http://127.0.0.1") as client:
        (card,) = client.get("/api/cards", params={"mark": "false_alarm"}).json()["cards"]
    assert card["id"] == row["image_id"]


def test_the_page_is_served_to_this_machine_alone(client) -> None:
    assert "GLAD report" in client.get("/").text
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400


def test_a_mark_has_a_note_and_counts_as_reviewed(client, judged) -> None:
    shown = client.get("/api/cards", params={"verdict": "anomalous", "mark": "unmarked", "count": 2}).json()
    assert (shown["to_review"], shown["reviewed"]) == (shown["total"], 0)
    card = shown["cards"][0]
    mark = {"file": card["file"], "image_id": card["id"], "verdict": "false_alarm", "note": "=dust, ü"}
    client.post("/api/marks", json=mark)
    again = client.get("/api/cards", params={"verdict": "anomalous", "mark": "false_alarm"}).json()
    assert (again["total"], again["to_review"], again["reviewed"]) == (1, shown["total"], 1)
    assert again["cards"][0]["note"] == "=dust, ü"
    assert feedback.read_marks(judged.run)[0]["note"] == "=dust, ü"
    assert client.post("/api/marks", json=mark | {"note": "x" * 2001}).status_code == 422


def test_the_table_is_of_what_the_filter_shows(client, judged) -> None:
    reply = client.get("/api/verdicts.csv", params={"verdict": "anomalous", "category": "cable"})
    assert "attachment" in reply.headers["content-disposition"]
    table = pd.read_csv(io.BytesIO(reply.content))
    assert set(table.uri) == {row["uri"] for row in judged.rows if row["is_anomalous"] and row["category"] == "cable"}


def test_colleagues_need_the_link_with_its_token(judged) -> None:
    app = make_app(judged.run, "secret")
    with TestClient(app, base_url="http://factory:8080") as client:
        for path in ("/", "/api/cards", "/api/verdicts.csv", "/?token=", "/?token=wrong", "/?token=s%C3%A9cret"):
            assert client.get(path).status_code == 403
        assert client.post("/api/marks", json={}).status_code == 403
        assert client.get("/", headers={"cookie": "glad-view-8080=wrong"}).status_code == 403
        page = client.get("/?token=secret")
        assert page.status_code == 200
        assert "token" not in str(page.url)
        assert "SameSite=lax" in page.history[0].headers["set-cookie"], "strict would fail from a mail"
        assert client.get("/api/cards").status_code == 200
    with TestClient(app, base_url="http://factory:8080") as stranger:
        assert stranger.get("/").status_code == 403


def test_an_address_of_another_machine_is_one_line(judged) -> None:
    for host in ("192.0.2.1", "no.such.host.invalid", "x" * 70, "a b"):
        with pytest.raises(GladError, match="choose another --port"):
            view(judged.run.location, 0, Console(quiet=True), host)


def test_an_unfinished_run_is_refused(tmp_path) -> None:
    with pytest.raises(GladError, match="no finished run"):
        make_app(Run.at(str(tmp_path)))
