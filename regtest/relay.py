"""A program: takes TCP connections, makes one to a node for each, and passes on what comes, later.

    relay.py PID_FILE LISTEN_HOST HOST:PORT SECONDS

Writes its own port and then its process id into PID_FILE and beside it (.port). It imports nothing of ours, so that it
starts at once. Each direction is late by SECONDS, however much is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

CHUNK = 1 << 16  # bytes
CHUNKS_UNDER_WAY = 256  # for each direction; then the sender has to wait


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    under_way = asyncio.Queue[tuple[float, bytes]](CHUNKS_UNDER_WAY)

    async def receive() -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:  # reset by its end
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
        except OSError:  # the node is down: so is the link
            writer.close()
            return
        await asyncio.gather(_pass_on(reader, onward_writer, seconds), _pass_on(onward_reader, writer, seconds))

    server = await asyncio.start_server(connected, listen_host, 0)
    pid_file.with_suffix(".port").write_text(str(server.sockets[0].getsockname()[1]))
    pid_file.with_suffix(".new").write_text(str(os.getpid()))
    pid_file.with_suffix(".new").replace(pid_file)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])))
