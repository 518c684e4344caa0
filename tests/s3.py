"""A local S3 server (moto), its objects as pyarrow sees them, and a connection to it that can stand still."""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from moto.server import ThreadedMotoServer
from pyarrow import fs

USER, PASSWORD = "AKIAEXAMPLE", "Zq81/Secret+99"
"""Credentials in URIs; the server accepts any."""


class Bucket:
    """One bucket of a running server."""

    def __init__(self, host: str):
        self.host = host
        self._query = f"scheme=http&endpoint_override={host}&region=us-east-1"
        self.files = fs.S3FileSystem(
            access_key=USER, secret_key=PASSWORD, scheme="http", endpoint_override=host, region="us-east-1",
            allow_bucket_creation=True,
        )  # fmt: skip
        self.files.create_dir("bucket")

    def uri(self, path: str) -> str:
        """Return a URI with credentials in it."""
        return f"s3://{USER}:{PASSWORD.replace('/', '%2F').replace('+', '%2B')}@bucket/{path}?{self._query}"

    def names(self, path: str) -> list[str]:
        """Return the names of all objects below a path, relative to it."""
        selector = fs.FileSelector(f"bucket/{path}", recursive=True, allow_not_found=True)
        found = [info.path for info in self.files.get_file_info(selector) if info.is_file]
        return sorted(name.removeprefix(f"bucket/{path}/") for name in found)

    def read(self, path: str) -> bytes:
        with self.files.open_input_stream(f"bucket/{path}") as stream:
            return stream.read()

    def write(self, path: str, data: bytes) -> None:
        with self.files.open_output_stream(f"bucket/{path}") as stream:
            stream.write(data)


@contextmanager
def serve_bucket() -> Iterator[Bucket]:
    """Run a server on a free port of this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Bucket(f"{host}:{port}")
    finally:
        server.stop()


class Link:
    """Relays connections to `host`; they stand still while `flows` is not set.

    Attributes:
        host: the relay's own address.
    """

    def __init__(self, host: str):
        self._target = host.split(":")
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.flows = Event()
        self.flows.set()
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection((self._target[0], int(self._target[1])))
                for source, target in ((client, server), (server, client)):
                    Thread(target=self._relay, args=(source, target), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 16):
                self.flows.wait()
                target.sendall(data)
