"""A local OpenAI-compatible endpoint with configurable failures."""

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes | None = None
    """By default the result of the endpoint's `answer` for the request."""
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut_off: bool = False


@dataclass(frozen=True)
class ReceivedRequest:
    prompt: str
    path: str
    key: str
    body: dict[str, Any]
    at_seconds: float


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, some connections wait for a second


class Endpoint:
    """Answers each prompt with the replies in `replies`, one per request, and with normal replies after them.

    Attributes:
        requests: the received requests, if `records` is true.
        answer: returns the normal replies; by default completions that repeat the prompt in brackets.
    """

    def __init__(self, *, records: bool = True) -> None:
        self.replies: dict[str, list[Reply]] = defaultdict(list)
        self.answer: Callable[[dict[str, Any]], bytes] = completion
        self.requests: list[ReceivedRequest] = []
        self._records = records
        self.max_concurrent = 0
        self._open = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Remove all replies and recorded requests."""
        self.replies.clear()
        self.requests.clear()
        self.answer = completion

    def requests_for(self, prompt: str) -> list[ReceivedRequest]:
        return [request for request in self.requests if request.prompt == prompt]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reply = endpoint._begin(self.path, self.headers.get("authorization", ""), body)
                time.sleep(reply.delay_seconds)
                content = endpoint.answer(body) if reply.body is None else reply.body
                with endpoint._lock:
                    endpoint._open -= 1
                self.send_response(reply.status)
                for name, value in ({"content-type": "application/json"} | reply.headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client closed the connection
                    self.wfile.write(content[: len(content) // 2] if reply.cut_off else content)
                self.close_connection = reply.cut_off

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        return Handler

    def _begin(self, path: str, key: str, body: dict[str, Any]) -> Reply:
        prompt = prompt_of(body)
        with self._lock:
            self._open += 1
            self.max_concurrent = max(self.max_concurrent, self._open)
            if self._records:
                self.requests.append(ReceivedRequest(prompt, path, key, body, time.monotonic()))
            return self.replies[prompt].pop(0) if self.replies.get(prompt) else Reply()


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def completion(body: dict[str, Any], generated: str | None = None, **changed: Any) -> bytes:
    """Return a normal reply to `body`: three prompt tokens, two generated; `changed` are fields of its choice."""
    text = f"[{prompt_of(body)}]" if generated is None else generated
    content = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None} | content | changed
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return json.dumps(
        {"id": "1", "object": "x", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    ).encode()
