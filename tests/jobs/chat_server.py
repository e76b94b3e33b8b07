"""A local server of chat completions that answers late, wrongly, or not at all, by a plan.

What it answers follows from a request's body alone. Faults follow from the body's digest and from
how often it was asked, so that every request has its answer in the end.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Writer = Callable[[dict[str, Any]], str]


class ChatServer:
    """`with ChatServer(write) as server: server.url`.

    write: body of a request -> text of the answer. faults: number of the trial, from 1, and digest
    as a number -> what goes wrong: a status, "late", "broken" (JSON cut in the middle),
    "words" (no completion), "length" (an answer that was cut) or None.
    asked: digest -> its trials; answered: digest -> its complete answers. on_request: is called
    with the count of all requests, before one is answered. pause: what a 429 asks for.
    """

    def __init__(
        self,
        write: Writer,
        faults: Callable[[int, int], Any] = lambda trial, number: None,
        on_request: Callable[[int], None] = lambda count: None,
        pause: float = 0.02,
    ) -> None:
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.bodies: dict[str, dict[str, Any]] = {}
        self.keys: set[str | None] = set()
        self.busy = self.most = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                body = json.loads(raw)
                digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
                with lock:
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                    outer.asked[digest] += 1
                    outer.bodies[digest] = body
                    outer.keys.add(self.headers["authorization"])
                    trial, count = outer.asked[digest], outer.asked.total()
                try:
                    on_request(count)
                    self.respond(body, digest, faults(trial, int(digest[:8], 16)))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # The client was killed.
                finally:
                    with lock:
                        outer.busy -= 1

            def respond(self, body: dict[str, Any], digest: str, fault: Any) -> None:
                if fault == "broken" and "response_format" not in body:
                    fault = None
                with lock:
                    outer.kinds[str(fault)] += 1
                if isinstance(fault, int):
                    error = {"error": {"message": f"planned {fault}"}}
                    headers = {"retry-after": str(pause)} if fault == 429 else {}
                    self.send(fault, json.dumps(error), headers)
                    return
                if fault == "late":
                    time.sleep(0.05)
                if fault == "words":
                    self.send(200, "no JSON at all", {})
                    return
                text = write(body)
                if fault == "broken":
                    text = text[: len(text) // 2]
                message = {"role": "assistant", "content": text}
                usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
                finish = "length" if fault == "length" else "stop"
                choice = {"index": 0, "message": message, "finish_reason": finish}
                completion = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [choice],
                    "usage": usage,
                }
                self.send(200, json.dumps(completion), {})
                with lock:
                    outer.answered[digest] += 1

            def send(self, status: int, text: str, headers: dict[str, str]) -> None:
                data = text.encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # A client that was killed resets its connections.

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def last_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def write(body: dict[str, Any]) -> str:
    """Play every role of the shipped prompts; lists have duplicates in them."""
    text, seed = last_text(body), body.get("seed", 0)
    schema = body.get("response_format", {}).get("json_schema", {}).get("name")
    word = hashlib.sha256(text.encode()).hexdigest()[:6]
    if schema == "Strings":
        count = int(re.search(r"\b(\d+)\b", text)[1])  # type: ignore[index]
        names = [f"{word} matter {number % max(1, count - 1)} of many" for number in range(count)]
        return json.dumps({"items": names})
    if schema == "YesNo":
        return json.dumps({"yes": int(word, 16) % 4 > 0})
    if schema == "Verdict":
        first, second = re.findall(r"\[(?:First|Second) answer\]\n(.*?)\n", text)
        return json.dumps({"better": "first" if len(first) >= len(second) else "second"})
    if schema == "Fitness":
        return json.dumps({"correct": int(word, 16) % 3 > 0, "quality": 4})
    if body["messages"][-1]["role"] == "assistant":
        return f"helpfulness:{len(text) % 5},verbosity:1"
    return f"Thanks a lot! An answer {word} from {body['model']} {'so ' * (seed % 3)}it goes."
