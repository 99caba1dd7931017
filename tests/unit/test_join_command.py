from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from redis.connection import PythonRespSerializer

from abreast.protocol.join import CaptureRow, Keys, Limits, join_arguments, join_command

SHA = "0" * 40
rows = st.tuples(st.text(max_size=40), st.text(max_size=12), st.integers(0, 100), st.binary(max_size=300))


@given(st.lists(rows, max_size=5), st.sampled_from(["shop", "bücher"]))
def test_join_command_equals_the_encoding_of_redis_py(captures: list[CaptureRow], service: str) -> None:
    captures = [row for row in captures if _text(row[0]) and _text(row[1])]
    keys, bounds = Keys(service, 3), Limits()
    names, arguments = join_arguments(keys, bounds, captures)
    client = PythonRespSerializer(6000, _encoded)
    packed = client.pack("EVALSHA", SHA, len(names), *names, *arguments)  # type: ignore[no-untyped-call]  # redis-py's

    assert join_command(SHA, keys, bounds, captures) == b"".join(packed)


def _text(value: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in value)


def _encoded(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
