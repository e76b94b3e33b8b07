"""Servers on loopback that the tests read from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` by byte ranges; `faults[path]` are what the next GETs of a path get instead.

    A fault is a status to answer with, "stall" (nothing comes), "truncate" (the connection closes
    in the middle), "short" (a well-formed answer of half the bytes) or "whole" (the range is
    ignored). `ranges` lists what was asked for, as (path, start, stop).
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.faults: dict[str, list[int | str]] = {}
        self.ranges: list[tuple[str, int, int]] = []
        self.stopping = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        data = self.server.files.get(self.path[1:])
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path[1:]
        data = self.server.files.get(name)
        if data is None:
            return self._answer(404, b"")
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last or len(data) - 1) + 1
        self.server.ranges.append((name, start, stop))
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        part = data[start:stop]
        if isinstance(fault, int):
            self._answer(fault, b"")
        elif fault == "stall":
            self.server.stopping.wait()
        elif fault == "truncate":
            self._answer(206, part[: len(part) // 2], length=len(part))
            self.close_connection = True
        elif fault == "short":
            self._answer(206, part[: len(part) // 2])
        elif fault == "whole":
            self._answer(200, data)
        else:
            self._answer(206, part)

    def _answer(self, status: int, data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FaultyServer]:
    """A running FaultyServer."""
    with FaultyServer(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()
