"""A storage in memory that counts what it is asked for, and fails or waits where a test wants it to."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Sequence

from anyio.lowlevel import checkpoint

from aiostage.abc import Buffer, PendingCheckpoint, Reader, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointExistsError, CheckpointNotFoundError

MANIFEST = "manifest.json"


class MemoryStorage(Storage):
    """Where a test's checkpoints lie.

    ``before`` is awaited before each operation with its name and the checkpoint's; it may wait, or raise.
    """

    def __init__(self) -> None:
        self.checkpoints: dict[str, dict[str, bytes]] = {}
        self.under_way: list[MemoryCheckpoint] = []
        self.most_pending = 0
        self.operations: Counter[str] = Counter()
        self.written_bytes: Counter[str] = Counter()
        self.before: Callable[[str, str], Awaitable[object]] | None = None

    async def happens(self, operation: str, name: str) -> None:
        await checkpoint()
        self.operations[operation] += 1
        if self.before is not None:
            await self.before(operation, name)

    async def open(self, name: str, *, overwrite: bool = False) -> PendingCheckpoint:
        await self.happens("open", name)
        if name in self.checkpoints and not overwrite:
            raise CheckpointExistsError("the target exists already.", path=name)
        pending = MemoryCheckpoint(self, name, overwrite)
        self.under_way.append(pending)
        self.most_pending = max(self.most_pending, len(self.under_way))
        return pending

    async def read(self, name: str) -> Reader:
        await self.happens("read", name)
        if name not in self.checkpoints:
            raise CheckpointNotFoundError("there is no checkpoint.", path=name)
        return MemoryReader(self, name)

    async def list(self) -> Sequence[str]:
        await self.happens("list", "")
        return list(self.checkpoints)

    async def pending(self) -> Sequence[str]:
        await self.happens("pending", "")
        return [pending.name for pending in self.under_way if pending.files]

    async def delete(self, name: str) -> None:
        await self.happens("delete", name)
        self.checkpoints.pop(name, None)

    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        for file in sorted(self.checkpoints.get(name, {}).keys() - {MANIFEST, *keep}):
            # Between two of them everything may come to an end.
            await self.happens("prune_files", name)
            self.checkpoints.get(name, {}).pop(file, None)

    async def clean_up(self) -> None:
        await self.happens("clean_up", "")


class MemoryCheckpoint(PendingCheckpoint):
    def __init__(self, storage: MemoryStorage, name: str, overwrite: bool) -> None:
        self.storage = storage
        self.name = name
        self.overwrite = overwrite
        self.files: dict[str, bytes] = {}

    @property
    def location(self) -> str:
        return f"test://{self.name}"

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        await self.storage.happens("write", self.name)
        data = bytearray()
        async for part in parts:
            await self.storage.happens("part", self.name)
            data += part
            # It has to go when it has been stored.
            del part
        assert len(data) == nbytes
        # As it is: a copy of a large file, in one step, would hold the event loop.
        self.files[name] = data
        self.storage.written_bytes[self.name] += nbytes

    async def commit(self, manifest: Buffer) -> None:
        await self.storage.happens("commit", self.name)
        if self.name in self.storage.checkpoints and not self.overwrite:
            raise CheckpointExistsError("the target exists already.", path=self.name)
        self.storage.checkpoints[self.name] = self.files | {MANIFEST: bytes(manifest)}
        self.storage.under_way.remove(self)

    async def abort(self) -> None:
        if self in self.storage.under_way:
            # No moment to be cancelled in, but one to be killed in.
            if self.storage.before is not None:
                await self.storage.before("abort", self.name)
            self.storage.under_way.remove(self)


class MemoryReader(Reader):
    def __init__(self, storage: MemoryStorage, name: str) -> None:
        self.storage = storage
        self.name = name
        self.files = storage.checkpoints[name]

    @property
    def location(self) -> str:
        return f"test://{self.name}"

    async def manifest(self) -> Buffer:
        await self.storage.happens("manifest", self.name)
        return memoryview(self.files[MANIFEST])

    async def size(self, name: str) -> int:
        await self.storage.happens("size", self.name)
        if name not in self.files:
            raise CheckpointCorruptError("the file is missing.", path=f"{self.location}/{name}")
        return len(self.files[name])

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        await self.storage.happens("read file", self.name)
        data = self.files.get(name, b"")[offset : offset + len(into)]
        if len(data) != len(into):
            raise CheckpointCorruptError("it ends too early.", path=f"{self.location}/{name}")
        into[:] = data

    async def aclose(self) -> None:
        return None
