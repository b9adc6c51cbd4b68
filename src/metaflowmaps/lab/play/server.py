"""The playground's server: one page, a few questions in JSON, nothing else; for the browser of whoever started it.

**Who may ask.** A page of another site must not: it would send its own ``Origin``, and one that gave its own name the
address of this machine (DNS rebinding) would send that name as ``Host``. Both are held to the names of this server.
Questions are JSON by POST, which no form of another site can send unasked. Nothing that a page says is a path: routes
and rewards are looked up, sizes are bounded, and the server writes no file.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from safetensors.torch import save

from metaflowmaps._files import finite
from metaflowmaps.errors import InputError
from metaflowmaps.lab.play.asked import AskedPictures, AskedPosterior, AskedSteering
from metaflowmaps.lab.play.playground import Busy, Playground
from metaflowmaps.lab.report.page import asset, document
from metaflowmaps.work.config import Config, validated

FOLDER = Path(__file__).parent
MAX_REQUEST_BYTES = 2**22  # a picture of 512 × 512 × 3 bytes, as numbers in JSON
IDLE_SECONDS = 30.0  # after which a connection that says nothing is closed
AUTHORITY = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[0-9A-Za-z.-]+)(?::(?P<port>[0-9]{1,5}))?")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A request that is not answered, and its status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class PlayServer(ThreadingHTTPServer):
    """Serves a playground.

    Args:
        playground: what is asked.
        host: the address it listens at.
        port: 0 for any that is free.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would let two servers have one port

    def __init__(self, playground: Playground, host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot listen at {host}, port {port} ({error}): give another --port, 0 for any"
            ) from None
        self.playground, self.host = playground, host
        self.page = document(
            "Meta flow map playground",
            asset("play.html", FOLDER),
            asset("page.css") + asset("play.css", FOLDER),
            asset("play.js", FOLDER),
            "; connect-src 'self'; form-action 'none'; base-uri 'none'",
        ).encode()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is nobody's business."""

    def knows(self, name: str) -> bool:
        """Is this a name of this server, with its port? A name that is no address must be its own or localhost."""
        parts = AUTHORITY.fullmatch(name)
        if parts is None or int(parts["port"] or 80) != self.server_port:
            return False
        host = parts["host"].strip("[]").lower()
        if host in ("localhost", self.host):
            return True
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or not ip_address(str(self.server_address[0])).is_loopback


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: PlayServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server_version, sys_version = "mfm", ""

    def do_GET(self) -> None:
        """The page, or what is to be saved."""
        self._answer({"/": self._page, "/samples.safetensors": self._samples})

    def do_POST(self) -> None:
        """A question."""
        play = self.server.playground
        self._answer(
            {
                "/about": lambda: self._asked(Config, lambda _: play.about()),
                "/pictures": lambda: self._asked(AskedPictures, play.pictures),
                "/posterior": lambda: self._asked(AskedPosterior, play.posterior),
                "/steer": lambda: self._asked(AskedSteering, play.steer),
                "/progress": lambda: self._asked(Config, lambda _: play.progress()),
                "/stop": lambda: self._asked(Config, lambda _: play.stop()),
            }
        )

    def _answer(self, routes: Mapping[str, Callable[[], None]]) -> None:
        try:
            self._check()
            if self.path not in routes:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
            routes[self.path]()
        except Refused as refused:
            self._refuse(refused.status, str(refused))
        except InputError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Busy as busy:
            self._refuse(HTTPStatus.CONFLICT, str(busy))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # of a reward or a network of the user's: the page says it
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _check(self) -> None:
        """Refuse who is not this server's page."""
        hosts, origin = self.headers.get_all("Host") or [], self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refused(HTTPStatus.FORBIDDEN, f"open {self.server.url}: this server answers to its own name alone")
        if origin is not None and origin != f"http://{hosts[0]}":
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site asked")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site asked")

    def _page(self) -> None:
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def _samples(self) -> None:
        job = self.server.playground.job
        if job is None or job.result is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there are no samples yet")
        result = job.result
        tensors = {"samples": result.samples, "rewards": result.rewards, "seeds": result.seeds}
        data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, {"command": job.command})
        named = {"Content-Disposition": 'attachment; filename="samples.safetensors"'}
        self._send(HTTPStatus.OK, "application/octet-stream", data, named)

    def _asked(self, kind: type[Any], answer: Callable[[Any], dict[str, Any]]) -> None:
        """Read a question, bounded, and send its answer."""
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "questions are application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a question says how long it is")
        if len(length) > 9 or int(length) > MAX_REQUEST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a question has at most {MAX_REQUEST_BYTES:,} bytes")
        try:
            held = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "that is no JSON") from None
        body = json.dumps(finite(answer(validated(kind, held)))).encode()
        self._send(HTTPStatus.OK, "application/json", body)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # what was not read of it must not be taken for the next question
        self._send(status, "application/json", json.dumps({"error": " ".join(message.split())}).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        sizes = {"Content-Type": kind, "Content-Length": str(len(body))}
        closing = {"Connection": "close"} if self.close_connection else {}
        for name, value in {**sizes, **HEADERS, **closing, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
