"""`glad view`: the report's page over all results of a run, served to a browser, and people's feedback on them.

The server has no login, so it listens on this machine alone.
"""

from __future__ import annotations

import socket
from threading import Thread
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi import Query as FromUrl
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from rich.console import Console
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cluster.storage import StorageError, clear_errors
from glad_core.errors import GladError
from pipelines.report.page import make_cards, render, summary
from pipelines.report.totals import count
from pipelines.runs import feedback
from pipelines.runs.query import Query, ResultKey, read_rows, search
from pipelines.runs.run import Run

HOST = "127.0.0.1"
CARD_BYTES = 200_000  # of a card's pictures
MARKED_COLUMNS = ["image_id", "uri", "category", "model_id", "score"]  # of a result, kept with its mark


class Mark(ResultKey):
    """A person's verdict on a result; None takes it back."""

    verdict: feedback.Verdict | None


class Cards(BaseModel):
    """The cards of one page of a search, and how many results match in all."""

    total: int
    cards: list[dict[str, Any]]


def view(run_folder: str, port: int, console: Console) -> None:
    """Serve the page until interrupted.

    Args:
        port: on this machine; 0 takes any free one.

    Raises:
        GladError, StorageError: no finished run there, or the port is taken.
    """
    app = make_app(Run.at(run_folder))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise GladError(f"port {port}: {error.strerror}; choose another --port, or none for a free one") from error
    with listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        console.print(f"{address} shows {run_folder}; Ctrl-C ends it", highlight=False, markup=False, soft_wrap=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        # In a thread of its own it leaves the signals alone, so that they end this command as they end every other.
        serving = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        serving.start()
        try:
            serving.join()
        finally:
            server.should_exit = True
            serving.join()


def make_app(run: Run) -> FastAPI:
    """The page of a finished run with its ``api/cards`` and ``api/marks``.

    Raises:
        GladError, StorageError: no finished run there.
    """
    viewer = Viewer(run)
    app = FastAPI(title="glad view", docs_url=None, redoc_url=None, openapi_url=None)
    # Refuses other host names, so that no foreign web page reaches this server by pointing its name at this machine.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return viewer.html

    @app.get("/api/cards")
    def cards(query: Annotated[Query, FromUrl()]) -> Cards:
        try:
            return viewer.cards(query)
        except (StorageError, GladError) as error:
            raise HTTPException(503, str(error)) from error

    @app.post("/api/marks")
    def keep(mark: Mark) -> dict[str, str]:
        try:
            viewer.keep(mark)
        except KeyError as error:
            raise HTTPException(404, "no such result") from error
        except StorageError as error:
            raise HTTPException(503, str(error)) from error
        return {"saved": mark.image_id}

    return app


class Viewer:
    """A finished run as the server shows it: the page, made once, and the marks, read once and then kept up to date."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.results = run.results()
        with clear_errors(run.location, run.storage):
            page = summary(run, count(self.results))
        self.scale = page["scale"]
        self.html = render(page | {"cards": []}, live=True)
        self.marks = {row["image_id"]: row["verdict"] for row in feedback.read_marks(run)}

    def cards(self, query: Query) -> Cards:
        """The cards of one page of a search. Raises GladError, StorageError: they cannot be read."""
        with clear_errors(self.run.location, self.run.storage):
            total, chosen = search(self.results, query, self.marks)
            cards = make_cards(self.run, self.results, chosen, self.scale, CARD_BYTES)
        for card, result in zip(cards, chosen, strict=True):
            card |= {"file": result.file, "mark": self.marks.get(card["id"])}
        return Cards(total=total, cards=cards)

    def keep(self, mark: Mark) -> None:
        """Keep or take back a mark. Raises KeyError: no such result. StorageError: it cannot be written."""
        with clear_errors(self.run.location, self.run.storage):
            (row,) = read_rows(self.results, [mark], MARKED_COLUMNS)
            feedback.mark(self.run, row, mark.verdict)
        if mark.verdict is None:
            self.marks.pop(mark.image_id, None)
        else:
            self.marks[mark.image_id] = mark.verdict
