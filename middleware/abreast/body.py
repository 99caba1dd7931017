"""The bytes of one body, noted as they pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from abreast.capture import DIGEST_SIZE, Body, digest
from abreast.worker import MOST_FILES, WORKER

HOLD = 64 * 1024  # bytes that are always held until the background hashes them, whatever the limit
BATCH = 32 * 1024  # bytes that are handed to the thread at once, since waking it costs more than hashing them
BLOCK = 256 * 1024  # bytes read from a file at once


@dataclass(frozen=True, slots=True)
class FilePart:
    """A descriptor of our own, so that the app may close or remove its file at once."""

    descriptor: int
    offset: int
    count: int | None  # bytes; None means up to the end

    @classmethod
    def of_path(cls, path: str) -> FilePart:
        """Raise OSError when the file can't be opened, or when too many are open already."""
        return cls(_take(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)), 0, None)

    @classmethod
    def of_descriptor(cls, file: int, offset: int | None, count: int | None) -> FilePart:
        """Raise OSError for what can't be read without moving its offset, such as a pipe."""
        at = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        return cls(_take(os.dup(file)), at, count)

    def read(self) -> Iterator[bytes]:
        at, left = self.offset, self.count
        while left is None or left > 0:
            block = os.pread(self.descriptor, BLOCK if left is None else min(BLOCK, left), at)
            if not block:
                return
            at += len(block)
            left = None if left is None else left - len(block)
            yield block

    def close(self) -> None:
        os.close(self.descriptor)
        WORKER.close_file()


def _take(descriptor: int) -> int:
    if not WORKER.open_file():
        os.close(descriptor)
        raise OSError(f"{MOST_FILES} files are open for recording already")
    return descriptor


class BodyRecorder:
    """Holds chunks up to a bound; of a longer body the first `limit` bytes, and a digest that the thread makes."""

    __slots__ = ("_bound", "_digest", "_late", "_late_size", "chunks", "held", "length", "limit", "parts")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0
        self.held = 0
        self.chunks: list[bytes] = []
        self.parts: list[bytes | FilePart] | None = None  # instead of chunks, once a file is part of the body
        self._bound = max(HOLD, limit)
        self._digest: hashlib.blake2b | None = None
        self._late: list[bytes] = []  # chunks that the thread has not got yet
        self._late_size = 0

    def add(self, chunk: bytes) -> None:
        """Raise TypeError for what is not bytes, and OverflowError for what the thread can't keep up with."""
        if chunk.__class__ is not bytes:
            chunk = _copy(chunk)
        self.length += len(chunk)
        if self.length <= self._bound:
            self.held = self.length
            (self.chunks if self.parts is None else self.parts).append(chunk)
        elif self.parts is None:
            self._pass(chunk)
        else:
            raise OverflowError("a file and many bytes in one body are not recorded")

    def add_file(self, part: FilePart) -> None:
        if self._digest is not None:
            part.close()
            raise OverflowError("many bytes and a file in one body are not recorded")
        if self.parts is None:
            self.parts = list(self.chunks)
        self.parts.append(part)

    def _pass(self, chunk: bytes) -> None:
        if self._digest is None:
            self._digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
            self._late = list(self.chunks)
        self._late.append(chunk)
        self._late_size += len(chunk)
        if self._late_size > BATCH:
            self._hand_over()
        room = self.limit - self.held
        if room > 0:
            self.chunks.append(chunk[:room])
            self.held += min(room, len(chunk))

    def _hand_over(self) -> None:
        if not WORKER.has_room:
            raise OverflowError("a body came faster than it could be hashed")
        assert self._digest is not None
        update, chunks = self._digest.update, self._late
        WORKER.submit(lambda: _each(update, chunks), self._late_size)
        self._late, self._late_size = [], 0

    @property
    def needs_thread(self) -> bool:
        return self._digest is not None or self.parts is not None

    def finish(self) -> None:
        """Runs in the thread, after all that it was handed. Raise OSError when a file can't be read."""
        if self._digest is not None:
            _each(self._digest.update, self._late)
            self._late = []
        if self.parts is not None:
            self._read(self.parts)

    def _read(self, parts: list[bytes | FilePart]) -> None:
        held, self.length = bytearray(), 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
        for part in parts:
            for block in (part,) if isinstance(part, bytes) else part.read():
                self.length += len(block)
                self._digest.update(block)
                held += block[: max(0, self.limit - len(held))]
        self.chunks = [bytes(held)]
        self.held = len(held)

    def close(self) -> None:
        for part in self.parts or ():
            if isinstance(part, FilePart):
                part.close()
        self.parts = None

    def body(self) -> Body:
        """What was recorded. Call it in the background: it may hash up to 64 KiB."""
        held = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        if self._digest is None or self.length <= self.limit:
            return short_body(held, self.limit)
        return Body(held[: self.limit], self.length, self._digest.hexdigest())


def short_body(whole: bytes, limit: int) -> Body:
    if len(whole) <= limit:
        return Body(whole, len(whole))
    return Body(whole[:limit], len(whole), digest(whole))


def _copy(chunk: object) -> bytes:
    """A buffer that the app may use again."""
    if isinstance(chunk, bytes | bytearray | memoryview):
        return bytes(chunk)
    raise TypeError(f"a chunk of a body must be bytes, got {type(chunk).__name__}")


def _each(update: Callable[[bytes], None], chunks: list[bytes]) -> None:
    for chunk in chunks:
        update(chunk)
