"""Ports for processes that find each other under an address of their own."""

import socket


def reserve_port() -> socket.socket:
    """A socket whose port nobody else is given while it is open; a server may still listen there.

    A port that is only looked up and closed again may be taken by another program before its use.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
