"""`glad view`: the report's page over all results of a run, its cards read as they are asked for, and feedback.

It listens on this machine alone: nobody has to log in, so nobody else may reach it.
"""

from __future__ import annotations

import socket
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi import Query as FromUrl
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from rich.console import Console
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cluster.storage import Storage, StorageError, clear_errors, is_s3, local_path
from glad_core.errors import GladError
from pipelines.report.page import count, make_cards, render, summary
from pipelines.runs.run import Run
from pipelines.runs import feedback
from pipelines.runs.query import Place, Query, open_results, read_rows, search
from pipelines.runs.schema import read_run

HOST = "127.0.0.1"
CARD_BYTES = 200_000  # of a card's pictures
PLAIN = ["image_id", "uri", "category", "model_id", "score"]


class Mark(Place):
    """What a person says of a result; None takes it back."""

    verdict: feedback.Verdict | None


class Cards(BaseModel):
    """A page of cards, and how many results fit in all."""

    total: int
    cards: list[dict[str, Any]]


def view(run_folder: str, port: int, console: Console) -> None:
    """Serve the page until interrupted.

    Raises:
        GladError, StorageError: no finished run there, or the port is taken.
    """
    app = make_app(run_folder, Storage.from_environment())
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise GladError(f"port {port}: {error.strerror}; choose another --port, or none for a free one") from error
    with listener:
        where = f"http://{HOST}:{listener.getsockname()[1]}"
        console.print(f"{where} shows {run_folder}; Ctrl-C ends it", highlight=False, markup=False, soft_wrap=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def make_app(run_folder: str, storage: Storage) -> FastAPI:
    """The page, ``api/cards`` and ``api/marks`` of a finished run.

    Raises:
        GladError, StorageError: no finished run there.
    """
    folder = run_folder.rstrip("/") if is_s3(run_folder) else local_path(run_folder)
    run = read_run(folder, storage)
    found = open_results(folder, storage)
    with clear_errors(folder, storage):
        page = summary(folder, run, count(found), storage)
    html = render(page | {"cards": []}, live=True)
    marks = {row["image_id"]: row["verdict"] for row in feedback.read_marks(Run(folder, storage))}
    app = FastAPI(title="glad view", docs_url=None, redoc_url=None, openapi_url=None)
    # A web page elsewhere must not get here by pointing its own name at this machine.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return html

    @app.get("/api/cards")
    def cards(query: Annotated[Query, FromUrl()]) -> Cards:
        try:
            with clear_errors(folder, storage):
                total, places = search(found, query, marks)
                made = make_cards(folder, run, found, places, page["scale"], storage, CARD_BYTES)
        except (StorageError, GladError) as error:
            raise HTTPException(503, str(error)) from error
        return Cards(
            total=total,
            cards=[
                card | {"file": place.file, "mark": marks.get(card["id"])}
                for card, place in zip(made, places, strict=True)
            ],
        )

    @app.post("/api/marks")
    def mark(said: Mark) -> dict[str, str]:
        try:
            with clear_errors(folder, storage):
                (row,) = read_rows(found, [said], PLAIN)
                feedback.mark(Run(folder, storage), row, said.verdict)
        except KeyError as error:
            raise HTTPException(404, "no such result") from error
        except StorageError as error:
            raise HTTPException(503, str(error)) from error
        if said.verdict is None:
            marks.pop(said.image_id, None)
        else:
            marks[said.image_id] = said.verdict
        return {"saved": said.image_id}

    return app
