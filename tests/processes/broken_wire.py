"""A wire between a client and a server that breaks when it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
from enum import Enum


class Broken(Enum):
    BEFORE = "what the client says next does not arrive"
    AFTER = "what the client says next arrives, and the answer does not"


class Wire:
    """From a port of this machine to another one. Where one connection breaks, others get through; where the wire is
    `down`, none does; where it is `silent`, what the server says does not arrive, and nobody hears of that."""

    def __init__(self, port: int) -> None:
        self.breaks: Broken | None = None
        self.down = False
        self.silent = False
        self._server_port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self.down:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server_port))
            for pump in (self._say, self._answer):
                threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _say(self, client: socket.socket, server: socket.socket) -> None:
        while said := _received(client):
            broken, self.breaks = self.breaks, None
            if broken is Broken.BEFORE or (broken is None and self.down):
                break
            server.sendall(said)
            if broken is Broken.AFTER:
                client.shutdown(socket.SHUT_RDWR)
                return  # the server finds out when it answers
        for one in (client, server):
            with contextlib.suppress(OSError):  # the other side was first
                one.shutdown(socket.SHUT_RDWR)

    def _answer(self, client: socket.socket, server: socket.socket) -> None:
        while answer := _received(server):
            if self.silent:
                continue
            try:
                client.sendall(answer)
            except OSError:
                break
        for one in (client, server):
            one.close()


def _received(one: socket.socket) -> bytes:
    try:
        return one.recv(1 << 16)
    except OSError:
        return b""
