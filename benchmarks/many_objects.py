"""Hundreds of thousands of small files or objects, made as fast as the place takes them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote, urlsplit

CONNECTIONS = 24
Item = tuple[str, bytes]  # name and content


def make_files(folder: Path, items: Sequence[Item]) -> None:
    for name, data in items:
        path = folder / name
        if path.parent not in _made:
            path.parent.mkdir(parents=True, exist_ok=True)
            _made.add(path.parent)
        path.write_bytes(data)


_made: set[Path] = set()


def put_objects(endpoint: str, key: str, secret: str, bucket: str, items: Sequence[Item]) -> None:
    """Puts objects over a few open connections: boto3's own work is three times the server's.

    Signed in the old way (HMAC-SHA1), which Ceph and moto still take.
    """

    def put(run: Sequence[Item]) -> None:
        address = urlsplit(endpoint)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = connection.makefile("rb")
            for name, data in run:
                connection.sendall(_request(f"/{bucket}/{quote(name)}", data, key, secret))
                status = answers.readline()
                assert b" 200 " in status, (name, status)
                length = 0
                while (header := answers.readline()) != b"\r\n":
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                answers.read(length)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(put, [items[start::CONNECTIONS] for start in range(CONNECTIONS)]))


def _request(path: str, data: bytes, key: str, secret: str) -> bytes:
    date = formatdate(usegmt=True)
    signed = hmac.new(secret.encode(), f"PUT\n\n\n{date}\n{path}".encode(), hashlib.sha1).digest()
    head = (
        f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nDate: {date}\r\n"
        f"Authorization: AWS {key}:{base64.b64encode(signed).decode()}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data
