"""Delays TCP connections to a node.

    relay.py PID_FILE LISTEN_HOST HOST:PORT SECONDS

This program accepts TCP connections on LISTEN_HOST, on a free port. For each it connects to the node at HOST:PORT. It
passes on the data of both directions SECONDS later.

First it writes its port into a file beside PID_FILE, with the suffix .port. Then it writes its process id into
PID_FILE, on which it holds a lock until it ends. It imports only the standard library, so it starts quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from pathlib import Path

CHUNK = 1 << 16  # bytes
CHUNKS_UNDER_WAY = 256  # in each direction; with more the sender must wait, which limits the memory


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    under_way = asyncio.Queue[tuple[float, bytes]](CHUNKS_UNDER_WAY)

    async def receive() -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:  # the sender reset the connection
                data = b""
            await under_way.put((loop.time() + seconds, data))

    loop = asyncio.get_running_loop()
    receiving = asyncio.create_task(receive())
    try:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                return
            writer.write(data)
            await writer.drain()
    except OSError:
        return
    finally:
        receiving.cancel()
        writer.close()


async def _serve(pid_file: Path, listen_host: str, target: str, seconds: float) -> None:
    host, _, port = target.rpartition(":")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        except OSError:  # the node is down, so the link must be down
            writer.close()
            return
        await asyncio.gather(_pass_on(reader, onward_writer, seconds), _pass_on(onward_reader, writer, seconds))

    server = await asyncio.start_server(connected, listen_host, 0)
    pid_file.with_suffix(".port").write_text(str(server.sockets[0].getsockname()[1]))
    with pid_file.with_suffix(".new").open("w") as locked:
        fcntl.lockf(locked, fcntl.LOCK_EX)
        print(os.getpid(), file=locked, flush=True)
        pid_file.with_suffix(".new").replace(pid_file)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])))
