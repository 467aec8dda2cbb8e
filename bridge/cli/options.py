"""Options and kinds of values that several commands have."""

from __future__ import annotations

import re
from pathlib import Path

import click

NODE = click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("demo/node0"),
    show_default=True,
    help="The data directory of a running node that you trust.",
)


class Bytes32(click.ParamType[bytes]):
    """32 bytes in hex. `what` says of what, in a message."""

    name = "hex"

    def __init__(self, what: str) -> None:
        self._what = what

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Return the bytes."""
        if isinstance(value, bytes):
            return value
        if re.fullmatch("[0-9A-Fa-f]{64}", value):
            return bytes.fromhex(value)
        return self.fail(f"{value!r} is no {self._what} of 64 hex digits", param, ctx)


class BlockName(click.ParamType[int | str]):
    """A block by its height, as a number, or by its hash, as RPC shows it."""

    name = "block"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return the height or the hash."""
        if isinstance(value, int) or re.fullmatch("[0-9A-Fa-f]{64}", value):
            return value
        if re.fullmatch("[0-9]{1,9}", value):
            return int(value)
        return self.fail(f"{value!r} is neither a height nor a block hash of 64 hex digits", param, ctx)


class Heights(click.ParamType[tuple[int, int | None]]):
    """Heights: one, or a first and a last one, of which either may be left out. None is the tip's."""

    name = "heights"

    def convert(
        self, value: str | tuple[int, int | None], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        """Return the first and the last height."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{0,9})(\.\.)?([0-9]{0,9})", value)
        if not match or not (match[1] or match[3]):
            return self.fail(f"{value!r} are no heights such as 7, 3..7, 3.. or ..7", param, ctx)
        first, last = int(match[1] or 0), int(match[3]) if match[3] else None
        if not match[2]:
            last = first
        if last is not None and last < first:
            return self.fail(f"{value!r}: {last} is below {first}", param, ctx)
        return first, last


HEIGHTS = click.argument("heights", type=Heights(), default=(0, None), metavar="[FROM..TO]")
