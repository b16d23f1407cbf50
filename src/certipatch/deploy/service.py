"""The defended model as a service: an image in, its answer out, and a page for people.

One worker thread looks at one image at a time, for a batch is filled with views of one image; further
requests wait in a queue with an end. Nothing of an image is stored, and nothing is asked from anywhere.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import re
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fastapi
import numpy as np
import uvicorn
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image

from ..data.decode import UNREADABLE, why_unreadable
from ..errors import CertiPatchError, ConfigError
from .claims import CASES

PAGE = Path(__file__).parent / "service.html"


class Answering(Protocol):
    """What the service needs of a defended model: the predictor around torch has it, and the exported one."""

    def read(self, data: bytes) -> Any: ...

    def look(self, pixels: Any, *, prove: bool) -> dict[str, Any]: ...

    def about(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Limits:
    """What the service takes at most.

    Attributes:
        bytes: of an image file; refused before it is decoded.
        queue: images that wait or are looked at; more are refused with status 429.
        prove: whether proofs may be asked for, which take some hundred views.
    """

    bytes: int = 20_000_000
    queue: int = 8
    prove: bool = True


class RefusedError(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why


@dataclass
class Worker:
    """The one thread that looks at images, and how many wait for it."""

    model: Answering
    limits: Limits
    ready: bool = False
    waiting: int = 0
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    async def warm(self) -> None:
        """Look at a grey image once: what compiles does so now."""
        height, width = self.model.about()["image_size"]
        grey = io.BytesIO()
        Image.new("RGB", (width, height), (128, 128, 128)).save(grey, "PNG")
        await self._in_thread(lambda: self.model.look(self.model.read(grey.getvalue()), prove=False))
        self.ready = True

    async def look(self, data: bytes, *, prove: bool) -> dict[str, Any]:
        """The answer or the proof; raises RefusedError for a full queue, or what is no image."""
        if not self.ready:
            raise RefusedError(503, "the model is being made ready; try again in a moment")
        if self.waiting >= self.limits.queue:
            raise RefusedError(429, f"{self.waiting} images wait already; try again in a moment")
        self.waiting += 1
        try:
            return await self._in_thread(lambda: self._look(data, prove))
        except UNREADABLE as error:
            raise RefusedError(422, f"the image cannot be read ({why_unreadable(error)})") from error
        except CertiPatchError as error:
            raise RefusedError(500, str(error)) from error
        finally:
            self.waiting -= 1

    def _look(self, data: bytes, prove: bool) -> dict[str, Any]:
        started = time.perf_counter()
        pixels = self.model.read(data)
        found = self.model.look(pixels, prove=prove)
        array = np.ascontiguousarray(np.asarray(pixels))
        return {
            **found,
            "case_in_words": CASES[found["case"]],
            "pixels": hashlib.sha256(array.tobytes()).hexdigest(),
            "seen": _as_address(array),
            "seconds": round(time.perf_counter() - started, 4),
        }

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)


def _as_address(pixels: np.ndarray) -> str:
    """(3, H, W) uint8 as a ``data:`` address of a PNG: what the model sees, exactly."""
    data = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def service(
    model: Answering, about: dict[str, Any], limits: Limits, hosts: set[str] | None
) -> fastapi.FastAPI:
    """The application.

    Args:
        about: what is known of the model, for ``/about``.
        hosts: names by which the service may be called; None for any. A page of somebody else's could
            otherwise reach a service on the user's own machine.
    """
    worker = Worker(model, limits)

    @asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> Any:
        making_ready = asyncio.create_task(worker.warm())
        yield
        making_ready.cancel()
        worker.thread.shutdown(wait=False, cancel_futures=True)

    app = fastapi.FastAPI(title="CertiPatch", docs_url=None, redoc_url=None, lifespan=lifespan)
    _guard(app, hosts)
    _routes(app, worker, {**model.about(), **about})
    return app


def _guard(app: fastapi.FastAPI, hosts: set[str] | None) -> None:
    """What becomes of a refusal and of foreign requests, and the headers of every answer."""
    _, policy = _page()

    @app.exception_handler(RefusedError)
    async def refuse(_: fastapi.Request, refused: RefusedError) -> JSONResponse:
        again = {"Retry-After": "1"} if refused.status in (429, 503) else {}
        return JSONResponse({"error": refused.why}, refused.status, headers=again)

    @app.middleware("http")
    async def guard(
        request: fastapi.Request, follow: Callable[[fastapi.Request], Awaitable[Response]]
    ) -> Response:
        if foreign := _foreign(request, hosts):
            return JSONResponse({"error": foreign}, 403)
        answer = await follow(request)
        answer.headers.update(policy)
        return answer


def _routes(app: fastapi.FastAPI, worker: Worker, about: dict[str, Any]) -> None:
    limits, (page, _) = worker.limits, _page()

    @app.get("/", response_class=HTMLResponse)
    async def for_people() -> str:
        return page

    @app.get("/about")
    async def known() -> dict[str, Any]:
        return {**about, "proofs": limits.prove, "max_bytes": limits.bytes}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not worker.ready:
            raise RefusedError(503, "the model is being made ready; try again in a moment")
        return {"ready": True, "waiting": worker.waiting}

    @app.post("/predict")
    async def predict(request: fastapi.Request) -> dict[str, Any]:
        return await worker.look(await _body(request, limits.bytes), prove=False)

    @app.post("/prove")
    async def prove(request: fastapi.Request) -> dict[str, Any]:
        if not limits.prove:
            raise RefusedError(404, "proofs are switched off here")
        return await worker.look(await _body(request, limits.bytes), prove=True)


def _page() -> tuple[str, dict[str, str]]:
    """The page, and headers under which a browser runs its script alone and asks nobody else."""
    text = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text, {
        "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _foreign(request: fastapi.Request, hosts: set[str] | None) -> str:
    """Why a request is not answered that comes by another name or from another site's page; else empty."""
    host = request.headers.get("host", "")
    if hosts is not None and host.rpartition(":")[0] not in hosts and host not in hosts:
        return f"expected to be called as {' or '.join(sorted(hosts))}, found {host!r}"
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return f"a page of {origin!r} may not use this service"
    return ""


async def _body(request: fastapi.Request, most: int) -> bytes:
    """The bytes of the image file that is the body of a request; no more are read than are taken."""
    why = f"expected an image file of at most {most} bytes as the body"
    if int(request.headers.get("content-length") or 0) > most:
        raise RefusedError(413, f"{why}, found {request.headers['content-length']}")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise RefusedError(413, f"{why}, found more")
    return bytes(data)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError for a port in use or an address that is none here."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unusable(host, port, error) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen(128)
    except OSError as error:
        found.close()
        raise _unusable(host, port, error) from error
    return found


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    why = error.strerror or error
    return ConfigError(f"port {port} of {host}: cannot be used ({why}); choose another --port or --host")


def run(app: fastapi.FastAPI, listening: socket.socket) -> None:
    """Serve until the process is told to stop."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
