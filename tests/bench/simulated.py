"""Many miners in one process, which train nothing: they join, commit to an update of the right form, and send it.

    simulated.py FILE

FILE (JSON) has the network's options, the number of the model's parameters, and each miner's name and credential.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import nats.errors
import torch
from coincurve import PrivateKey
from nats.aio.client import Client

from traincert.bridge.broker import Credential, connect
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.messages import Closing, CommitMessage, Join, Message, Opening, seal, unseal
from traincert.trainer.engines.broker import CHUNK, read_poll_answer
from traincert.trainer.updates import Update, encode_update

ONCE = asyncio.Semaphore(50)  # connections that are being made


class Simulated:
    """One miner."""

    def __init__(self, number: int, credential: Credential, name: str, params: TrainingParams, size: int) -> None:
        self.key = PrivateKey(hashlib.sha256(f"simulated {number}".encode()).digest())
        self.credential, self.name, self.params = credential, name, params
        move = torch.randn(size, generator=torch.Generator().manual_seed(number)) * 1e-3
        self.update, _ = encode_update(Update(move), 1.0)
        self.digest = hashlib.sha256(self.update).digest()
        self.client: Client

    async def run(self) -> None:
        """Take part until the process is killed."""
        async with ONCE:
            self.client = await connect(self.credential)
            await self.ask("join", self.seal(Join(self.name)))
        since: dict[str, Any] = {"boot": "", "version": 0, "session": self.name}
        opening = b""
        while True:
            answer, notices = read_poll_answer(await self.ask("poll", json.dumps(since).encode()))
            since |= {"boot": answer["boot"], "version": answer["version"]}
            for kind, statement in notices.items():
                if kind == "opening":
                    opening = read_opening(self.params.chain_id, statement)
                    size = len(self.update)
                    commit = CommitMessage(opening, self.digest, size, None, None, 0.0, "simulated")
                    await self.ask("commit", self.seal(commit))
                elif kind == "reveal" and unseal(self.params.chain_id, Closing, statement)[1].opening == opening:
                    for offset in range(0, len(self.update), CHUNK):
                        head = self.digest + struct.pack("<QQ", len(self.update), offset)
                        await self.ask("update", head + self.update[offset : offset + CHUNK])

    def seal(self, message: Message) -> bytes:
        """Return this miner's statement of a message."""
        return seal(self.key, self.params.chain_id, message)

    async def ask(self, kind: str, data: bytes) -> bytes:
        """Send a request until it is answered."""
        while True:
            try:
                return (await self.client.request(f"traincert.{kind}", data, timeout=12)).data
            except (TimeoutError, nats.errors.Error):
                await asyncio.sleep(0.5)


@lru_cache(1)
def read_opening(chain_id: bytes, statement: bytes) -> bytes:
    """Check an opening, and return its SHA-256. All miners get the same; each real one has a machine of its own."""
    unseal(chain_id, Opening, statement)
    return hashlib.sha256(statement).digest()


async def main() -> None:
    """Run all miners of the file."""
    facts = json.loads(Path(sys.argv[1]).read_text())
    params = TrainingParams.from_node_options(facts["options"])
    miners = [
        Simulated(number, Credential(*each["credential"]), each["name"], params, facts["size"])
        for number, each in enumerate(facts["miners"])
    ]
    await asyncio.gather(*(miner.run() for miner in miners))


if __name__ == "__main__":
    asyncio.run(main())
