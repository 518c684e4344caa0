"""The check of links to the web finds dead ones."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.web_links import main


class Pages(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({"/here": 200, "/busy": 429}.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_dead_links_are_named_with_their_page(tmp_path, server, capsys):
    (tmp_path / "README.md").write_text(f"[a]({server}/here) [b]({server}/busy) [c](other.md) [d]({server}/gone)")
    (tmp_path / "more.md").write_text("[e](http://127.0.0.1:1/refused)")
    assert main(tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"README.md: {server}/gone: HTTP 404\n" in printed
    assert "more.md: http://127.0.0.1:1/refused: " in printed
    assert printed.endswith("4 links, 2 dead\n")


def test_pages_without_dead_links_pass(tmp_path, server, capsys):
    (tmp_path / "README.md").write_text(f"[a]({server}/here)")
    assert main(tmp_path) == 0
    assert capsys.readouterr().out == "1 links, 0 dead\n"
