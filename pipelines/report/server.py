"""`glad view`: the report's page over all results of a run, served to a browser, and people's feedback on them.

The server has no login, so it listens on this machine alone. Told to listen to others, it serves those who have the
link: there is a token in it, made anew at each start.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Awaitable, Callable
from threading import Thread
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Query as FromUrl
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from pydantic import BaseModel, Field
from rich.console import Console
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cluster.storage import StorageError, clear_errors
from glad_core.errors import GladError
from pipelines.export.verdicts import verdicts
from pipelines.report.page import make_cards, render, summary
from pipelines.report.totals import count
from pipelines.runs import feedback
from pipelines.runs.query import Query, ResultKey, condition, read_rows, search
from pipelines.runs.run import Run

HOST = "127.0.0.1"
CARD_BYTES = 200_000  # of a card's pictures
MARKED_COLUMNS = ["image_id", "uri", "category", "model_id", "score"]  # of a result, kept with its mark


class Mark(ResultKey):
    """A person's verdict on a result, and a note beside it; None takes both back."""

    verdict: feedback.Verdict | None
    note: str = Field("", max_length=2000)


class Cards(BaseModel):
    """The cards of one page of a search, and how many results match in all.

    Of those that match whatever their mark: their number, and how many of them are marked.
    """

    total: int
    to_review: int
    reviewed: int
    cards: list[dict[str, Any]]


def view(run_folder: str, port: int, console: Console, host: str = HOST) -> None:
    """Serve the page until interrupted, and open it in a browser if this terminal has one.

    Args:
        port: on this machine; 0 takes any free one.
        host: address to listen on; any but this machine's own is served with a token.

    Raises:
        GladError, StorageError: no finished run there, or the address cannot be used.
    """
    token = None if host == HOST else secrets.token_urlsafe(16)
    app = make_app(Run.at(run_folder), token)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a machine"
        raise GladError(
            f"{host}, port {port}: {reason}; choose another --port, or none for a free one, and a --host of "
            "this machine, such as 0.0.0.0 for all of them"
        ) from error
    with listener:
        name = socket.gethostname() if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}" + (f"/?token={token}" if token else "")
        console.print(f"{address} shows {run_folder}; Ctrl-C ends it", highlight=False, markup=False, soft_wrap=True)
        if token:
            console.print("whoever has this link sees the pictures and can mark them; it is not encrypted")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        # In a thread of its own it leaves the signals alone, so that they end this command as they end every other.
        serving = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        serving.start()
        if sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(address)
        try:
            serving.join()
        finally:
            server.should_exit = True
            serving.join()


def make_app(run: Run, token: str | None = None) -> FastAPI:
    """The page of a finished run with its ``api/cards``, ``api/marks`` and ``api/verdicts.csv``.

    Args:
        token: that a browser has to bring once, in its first link; None serves this machine alone.

    Raises:
        GladError, StorageError: no finished run there.
    """
    viewer = Viewer(run)
    app = FastAPI(title="glad view", docs_url=None, redoc_url=None, openapi_url=None)
    if token is None:
        # Refuses other host names: no foreign web page reaches this server by pointing its name at this machine.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    else:
        _ask_for(token, app)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return viewer.html

    @app.get("/api/cards")
    def cards(query: Annotated[Query, FromUrl()]) -> Cards:
        try:
            return viewer.cards(query)
        except (StorageError, GladError) as error:
            raise HTTPException(503, str(error)) from error

    @app.get("/api/verdicts.csv")
    def table(query: Annotated[Query, FromUrl()]) -> Response:
        try:
            content = viewer.table(query)
        except (StorageError, GladError) as error:
            raise HTTPException(503, str(error)) from error
        headers = {"content-disposition": 'attachment; filename="verdicts.csv"'}
        return Response(content, media_type="text/csv; charset=utf-8", headers=headers)

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


def _ask_for(token: str, app: FastAPI) -> None:
    """Serve only browsers that know the token: from the link, and from then on from a cookie of this server."""

    @app.middleware("http")
    async def check(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        name = f"glad-view-{request.scope['server'][1]}"  # cookies know no ports, and a machine may serve several runs
        if secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            reply: Response = RedirectResponse(request.url.path)  # the token does not stay in the address
            # Not strict: a browser would leave it out after this redirect if the link was clicked in a mail or a chat.
            reply.set_cookie(name, token, httponly=True, samesite="lax")
            return reply
        if secrets.compare_digest(request.cookies.get(name, "").encode(), token.encode()):
            return await answer(request)
        return PlainTextResponse("Open the link that `glad view` printed: its token is missing here.", 403)


class Viewer:
    """A finished run as the server shows it: the page, made once, and the marks, read once and then kept up to date."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.results = run.results()
        with clear_errors(run.location, run.storage):
            page = summary(run, count(run, self.results))
        self.scale = page["scale"]
        self.html = render(page | {"cards": []}, live=True)
        self.marks = {mark["image_id"]: mark for mark in feedback.read_marks(run)}

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdicts of the marks by image id."""
        return {image_id: mark["verdict"] for image_id, mark in self.marks.items()}

    def cards(self, query: Query) -> Cards:
        """The cards of one page of a search. Raises GladError, StorageError: they cannot be read."""
        with clear_errors(self.run.location, self.run.storage):
            total, chosen = search(self.run, self.results, query, self.verdicts)
            cards = make_cards(self.run, self.results, chosen, self.scale, CARD_BYTES)
            to_review, reviewed = (
                self.results.count_rows(filter=condition(query.model_copy(update={"mark": mark}), self.verdicts))
                for mark in ("", "marked")
            )
        for card, result in zip(cards, chosen, strict=True):
            mark = self.marks.get(card["id"], {})
            card |= {"file": result.file, "mark": mark.get("verdict"), "note": mark.get("note") or ""}
        return Cards(total=total, to_review=to_review, reviewed=reviewed, cards=cards)

    def table(self, query: Query) -> bytes:
        """What matches a search as `verdicts`. Raises GladError, StorageError: it cannot be read."""
        with clear_errors(self.run.location, self.run.storage):
            return verdicts(self.run, self.results, condition(query, self.verdicts), self.marks)[0]

    def keep(self, mark: Mark) -> None:
        """Keep or take back a mark. Raises KeyError: no such result. StorageError: it cannot be written."""
        with clear_errors(self.run.location, self.run.storage):
            (row,) = read_rows(self.results, [mark], MARKED_COLUMNS)
            feedback.mark(self.run, row, mark.verdict, mark.note)
        if mark.verdict is None:
            self.marks.pop(mark.image_id, None)
        else:
            self.marks[mark.image_id] = {"verdict": mark.verdict, "note": mark.note}
