"""The bytes of one body, noted as they pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from abreast.capture import DIGEST_BYTES, Body, digest
from abreast.worker import BACKGROUND_THREAD, MAX_OPEN_FILES

MIN_BUFFER_BYTES = (
    64 * 1024
)  # bytes that are always held until the background hashes them, whatever the limit
HASH_BATCH_BYTES = (
    32 * 1024
)  # bytes that are handed to the thread at once, since waking it costs more than hashing them
FILE_BLOCK_BYTES = 256 * 1024  # bytes read from a file at once


@dataclass(frozen=True, slots=True)
class FileRange:
    """A descriptor of our own, so that the app may close or remove its file at once."""

    descriptor: int
    offset: int
    count: int | None  # bytes; None means up to the end

    @classmethod
    def from_path(cls, path: str) -> FileRange:
        """Raise OSError when the file can't be opened, or when too many are open already."""
        return cls(_claim_descriptor(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)), 0, None)

    @classmethod
    def from_descriptor(cls, file: int, offset: int | None, count: int | None) -> FileRange:
        """Raise OSError for what can't be read without moving its offset, such as a pipe."""
        position = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        return cls(_claim_descriptor(os.dup(file)), position, count)

    def read(self) -> Iterator[bytes]:
        position, remaining = self.offset, self.count
        while remaining is None or remaining > 0:
            block = os.pread(
                self.descriptor,
                FILE_BLOCK_BYTES if remaining is None else min(FILE_BLOCK_BYTES, remaining),
                position,
            )
            if not block:
                return
            position += len(block)
            remaining = None if remaining is None else remaining - len(block)
            yield block

    def close(self) -> None:
        os.close(self.descriptor)
        BACKGROUND_THREAD.release_file()


def _claim_descriptor(descriptor: int) -> int:
    if not BACKGROUND_THREAD.reserve_file():
        os.close(descriptor)
        raise OSError(f"{MAX_OPEN_FILES} files are open for recording already")
    return descriptor


class BodyBuffer:
    """Holds chunks up to a bound; of a longer body the first `limit` bytes, and a digest that the thread makes."""

    __slots__ = (
        "_capacity",
        "_digest",
        "_unhashed_bytes",
        "_unhashed_chunks",
        "buffered_bytes",
        "chunks",
        "length",
        "limit",
        "parts",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0
        self.buffered_bytes = 0
        self.chunks: list[bytes] = []
        self.parts: list[bytes | FileRange] | None = (
            None  # instead of chunks, once a file is part of the body
        )
        self._capacity = max(MIN_BUFFER_BYTES, limit)
        self._digest: hashlib.blake2b | None = None
        self._unhashed_chunks: list[bytes] = []  # chunks that the thread has not got yet
        self._unhashed_bytes = 0

    def add(self, chunk: bytes) -> None:
        """Raise TypeError for what is not bytes, and OverflowError for what the thread can't keep up with."""
        if chunk.__class__ is not bytes:
            chunk = _copy(chunk)
        self.length += len(chunk)
        if self.length <= self._capacity:
            self.buffered_bytes = self.length
            (self.chunks if self.parts is None else self.parts).append(chunk)
        elif self.parts is None:
            self._hash_chunk(chunk)
        else:
            raise OverflowError("a file and many bytes in one body are not recorded")

    def add_file(self, part: FileRange) -> None:
        if self._digest is not None:
            part.close()
            raise OverflowError("many bytes and a file in one body are not recorded")
        if self.parts is None:
            self.parts = list(self.chunks)
        self.parts.append(part)

    def _hash_chunk(self, chunk: bytes) -> None:
        if self._digest is None:
            self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            self._unhashed_chunks = list(self.chunks)
        self._unhashed_chunks.append(chunk)
        self._unhashed_bytes += len(chunk)
        if self._unhashed_bytes > HASH_BATCH_BYTES:
            self._submit_hashing()
        remaining = self.limit - self.buffered_bytes
        if remaining > 0:
            self.chunks.append(chunk[:remaining])
            self.buffered_bytes += min(remaining, len(chunk))

    def _submit_hashing(self) -> None:
        if not BACKGROUND_THREAD.has_room:
            raise OverflowError("a body came faster than it could be hashed")
        assert self._digest is not None
        update, chunks = self._digest.update, self._unhashed_chunks
        BACKGROUND_THREAD.submit(lambda: _update_digest(update, chunks), self._unhashed_bytes)
        self._unhashed_chunks, self._unhashed_bytes = [], 0

    @property
    def needs_thread(self) -> bool:
        return self._digest is not None or self.parts is not None

    def finish(self) -> None:
        """Runs in the thread, after all that it was handed. Raise OSError when a file can't be read."""
        if self._digest is not None:
            _update_digest(self._digest.update, self._unhashed_chunks)
            self._unhashed_chunks = []
        if self.parts is not None:
            self._read_parts(self.parts)

    def _read_parts(self, parts: list[bytes | FileRange]) -> None:
        content, self.length = bytearray(), 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in parts:
            for block in (part,) if isinstance(part, bytes) else part.read():
                self.length += len(block)
                self._digest.update(block)
                content += block[: max(0, self.limit - len(content))]
        self.chunks = [bytes(content)]
        self.buffered_bytes = len(content)

    def close(self) -> None:
        for part in self.parts or ():
            if isinstance(part, FileRange):
                part.close()
        self.parts = None

    def to_body(self) -> Body:
        """What was recorded. Call it in the background: it may hash up to 64 KiB."""
        content = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        if self._digest is None or self.length <= self.limit:
            return small_body(content, self.limit)
        return Body(content[: self.limit], self.length, self._digest.hexdigest())


def small_body(content: bytes, limit: int) -> Body:
    if len(content) <= limit:
        return Body(content, len(content))
    return Body(content[:limit], len(content), digest(content))


def _copy(chunk: object) -> bytes:
    """A buffer that the app may use again."""
    if isinstance(chunk, bytes | bytearray | memoryview):
        return bytes(chunk)
    raise TypeError(f"a chunk of a body must be bytes, got {type(chunk).__name__}")


def _update_digest(update: Callable[[bytes], None], chunks: list[bytes]) -> None:
    for chunk in chunks:
        update(chunk)
