"""A guest's service that a test plays itself, line by line, on the loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

#: A line of the client -> what is sent back.
Answer = Callable[[bytes], Iterable[bytes]]


@asynccontextmanager
async def serving(connected: Callable[[], Answer]) -> AsyncIterator[tuple[str, int]]:
    """The address. connected: called for each connection. An OSError that the answer raises hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = connected()
        try:
            while line := await reader.readline():
                writer.writelines(answer(line))
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield host, port
