"""A TCP proxy that passes bytes on unchanged, except for the faults it is told to make.

Signatures of S3 requests stay valid: the client signs the proxy's address, and the server checks what it got.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_ANSWERS = {  # in the server's place
    "503": b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "412": b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
}
_REQUEST = re.compile(rb"(GET|PUT|HEAD|POST|DELETE) \S+ HTTP/1\.1\r\n")


async def _cancel(tasks) -> None:  # type: ignore[no-untyped-def]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`kind`: "503" and "412" answer for the server; "close", "reset" and "stall" act on the server's answer after
    `after_bytes` of it, header included, were passed on (0: the request is served, its answer lost);
    "drip" lets the rest of the answer through at `bytes_per_second`."""

    kind: str
    method: str = "GET"
    after_bytes: int = 0
    bytes_per_second: float = 100.0


class FaultProxy:
    """Listens on 127.0.0.1:`port` while entered. `requests` holds the head of each request, in order;
    `connections` counts those that clients made."""

    def __init__(self, upstream_port: int) -> None:
        self.faults: deque[Fault] = deque()  # each one strikes the next request of its method
        self.weather: Callable[[str], Fault | None] | None = None  # asked for a fault where none is waiting
        self.requests: list[str] = []
        self.connections = 0
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(timeout=5)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})

    async def _serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            upstream_in, upstream_out = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:  # the server is down: so are we
            client_out.close()
            return
        current: list[Fault | None] = [None]  # of the request that this connection is busy with
        requests = self._pump_requests(client_in, client_out, upstream_out, current)
        answers = self._pump_answers(upstream_in, client_out, current)
        pumps = [asyncio.create_task(requests), asyncio.create_task(answers)]
        with contextlib.suppress(asyncio.CancelledError):  # by `_close`
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(pumps)
        client_out.close()
        upstream_out.close()

    async def _pump_requests(self, client_in, client_out, upstream_out, current) -> None:  # type: ignore[no-untyped-def]
        while data := await client_in.read(1 << 16):
            if match := _REQUEST.match(data):  # heads are small: they come in one piece
                self.requests.append(data.split(b"\r\n\r\n")[0].decode())
                struck = self.faults and self.faults[0].method == match[1].decode()
                current[0] = self.faults.popleft() if struck else None
                if not struck and self.weather is not None:
                    current[0] = self.weather(match[1].decode())
                if current[0] and current[0].kind in _ANSWERS:
                    client_out.write(_ANSWERS[current[0].kind])
                    return
            upstream_out.write(data)
            await upstream_out.drain()

    async def _drip(self, client_out, data, fault) -> bytes:  # type: ignore[no-untyped-def]
        """Let `data` through slowly; what is left is nothing, unless the client gave up meanwhile."""
        while data and not client_out.is_closing():
            count = max(1, int(fault.bytes_per_second / 20))
            with contextlib.suppress(ConnectionError):
                client_out.write(data[:count])
                await client_out.drain()
            data = data[count:]
            await asyncio.sleep(0.05)
        return b""

    async def _pump_answers(self, upstream_in, client_out, current) -> None:  # type: ignore[no-untyped-def]
        passed = 0
        while data := await upstream_in.read(1 << 16):
            fault, whole = current[0], data
            if fault and not data.startswith(b"HTTP/1.1 100"):
                data, broken = data[: fault.after_bytes - passed], passed + len(data) >= fault.after_bytes
                passed += len(data)
            else:
                passed, broken = 0, False
            if fault and fault.kind == "drip" and broken:
                broken = False
                data = await self._drip(client_out, whole, fault)
            with contextlib.suppress(ConnectionError):  # the client gave up: nobody is left to tell
                client_out.write(data)
                await client_out.drain()
            if broken and fault.kind == "stall":
                await asyncio.sleep(3600)
            if broken and fault.kind == "reset":
                await asyncio.sleep(0.1)  # a reset takes back what the client has not read yet
                linger = struct.pack("ii", 1, 0)  # close with RST, not FIN
                client_out.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            if broken:
                return
