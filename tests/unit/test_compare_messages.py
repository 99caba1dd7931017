"""gRPC messages as JSON, by descriptors."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.protobuf import any_pb2, empty_pb2, struct_pb2
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from abreast.protocol.capture import Answer, Body
from abreast_sidecar.compare.body import compare_bodies
from abreast_sidecar.compare.messages import (
    MAX_JSON_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_VALUES,
    ConvertedBody,
    DescriptorError,
    convert_body,
    find_method,
    parse_descriptor_set,
)
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.envoy.config import load_config
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import CollectorSettings
from support_grpc import (
    PROTO,
    PROTO2,
    compile_descriptors,
    frame,
    make_product,
    message_class,
    reorder,
    shop_pool,
    write_config,
)

OPTIONS = CompareOptions()


def nest_any(depth: int) -> bytes:
    """Return a Product with an Any that has another one, and so on."""
    content = any_pb2.Any()
    for _ in range(depth):
        content = any_pb2.Any(type_url="x/google.protobuf.Any", value=content.SerializeToString())
    product = message_class("Product")()
    product.extra.MergeFromString(content.SerializeToString())
    return bytes(product.SerializeToString())


def convert(
    body: bytes,
    coding: str = "",
    *,
    message_type: Descriptor | None = None,
    is_stream: bool = False,
    is_truncated: bool = False,
) -> ConvertedBody:
    return convert_body(
        body,
        coding,
        message_type or message_class("Product").DESCRIPTOR,
        lambda content: f"digest of {len(content)}",
        is_stream=is_stream,
        is_truncated=is_truncated,
    )


def convert_message(message: Any) -> Any:
    return orjson.loads(convert(frame(message.SerializeToString())).json)


def test_message_has_its_fields_by_name_and_type() -> None:
    product = make_product(stock=2**60, parts=[make_product()], image=b"\xff\0", rating=0.1)
    product.extra.Pack(message_class("ProductRequest")(name="more"))

    value = convert_message(product)

    assert value["stock"] == 2**60
    assert value["labels"] == {"a": 1, "b": 2}
    assert value["kind"] == "KIND_TEA"
    assert value["created"] == "2026-01-02T03:04:05Z"
    assert value["image"] == "/wA="
    assert value["rating"] == 0.1
    assert value["weight"] == 0  # it is set
    assert value["extra"] == {"@type": "type.googleapis.com/shop.v1.ProductRequest", "name": "more"}
    assert value["parts"][0]["name"] == "Tea"
    assert value["parts"][0]["stock"] == 0


def test_fields_without_a_value_have_their_default() -> None:
    value = convert_message(message_class("Product")())

    assert value == {
        "name": "", "price": 0.0, "stock": 0, "labels": {}, "parts": [], "password": "", "kind": "KIND_UNSPECIFIED",
        "image": "", "rating": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({"kind": 7}, "kind", 7),
        ({"price": float("nan")}, "price", "nan"),
        ({"rating": float("-inf")}, "rating", "-inf"),
        ({"rating": 3.4028234663852886e38}, "rating", 3.4028234663852886e38),
        ({"extra": {"type_url": "x/unknown.Type", "value": b"a"}}, "extra", {"type_url": "x/unknown.Type", "value": "YQ=="}),
        ({"created": {"seconds": 10**15}}, "created", {"seconds": 10**15, "nanos": 0}),
    ],
)  # fmt: skip
def test_unusual_values_are_kept(values: Any, path: str, expected: object) -> None:
    assert convert_message(message_class("Product")(**values))[path] == expected


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float_is_the_same_number(number: float) -> None:
    rating = convert_message(message_class("Product")(rating=number))["rating"]

    assert struct.unpack("<f", struct.pack("<f", rating))[0] == number


@given(
    st.builds(
        lambda name, price, labels, stock: message_class("Product")(
            name=name, price=price, labels=labels, stock=stock
        ),
        st.text(max_size=20),
        st.floats(allow_nan=False),
        st.dictionaries(st.text(max_size=5), st.integers(-(2**31), 2**31 - 1), max_size=5),
        st.integers(0, 127),
    )
)  # fmt: skip
def test_order_defaults_and_unknown_fields_are_no_difference(product: Any) -> None:
    old, new = convert(frame(product.SerializeToString())), convert(frame(reorder(product)))

    assert old.json == new.json
    assert (old.has_unknown_fields, new.has_unknown_fields) == (False, True)


def test_stream_has_a_line_for_each_message() -> None:
    body = frame(make_product(stock=1).SerializeToString(), make_product(stock=2).SerializeToString())

    lines = convert(body, is_stream=True).json.splitlines()
    assert [orjson.loads(line)["stock"] for line in lines] == [1, 2]
    truncated = convert(body[:-1], is_stream=True, is_truncated=True)
    assert (truncated.json, truncated.is_fit) == (lines[0] + b"\n", True)


def test_compressed_message_is_decompressed() -> None:
    message = make_product().SerializeToString()

    assert convert(frame(gzip.compress(message), flag=1), "gzip") == convert(frame(message))


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (frame(b"\x0a\x02\xff\xfe"), ""),  # no UTF-8
        (frame(b"\x0a\x7f"), ""),  # it ends early
        (frame(b"")[:-1] + b"\x09", ""),
        (frame(b"", b""), ""),  # two messages of a unary call
        (frame(b"x", flag=2), ""),
        (frame(gzip.compress(b""), flag=1), ""),
        (frame(gzip.compress(b""), flag=1), "snappy"),
        (frame(gzip.compress(b"\x2a\0" * (MAX_MESSAGE_BYTES // 2 + 1)), flag=1), "gzip"),
        (frame(b"\x2a\0" * MAX_VALUES), ""),  # each part has a value for each field
        (frame(nest_any(600)), ""),  # too deep for JSON
    ],
)
def test_message_that_does_not_fit_becomes_its_length_and_digest(body: bytes, coding: str) -> None:
    converted = convert(body, coding)

    assert not converted.is_fit
    assert re.fullmatch(rb'"\d+ bytes, digest of \d+"', converted.json)


EMPTY, LIST = empty_pb2.Empty.DESCRIPTOR, struct_pb2.ListValue.DESCRIPTOR


@pytest.mark.parametrize(
    ("message_type", "unit", "count", "is_fit"),
    [
        (EMPTY, b"", MAX_VALUES, True),  # a message without fields is a value
        (EMPTY, b"", MAX_VALUES + 1, False),
        (LIST, b"\x0a\0", MAX_VALUES // 2, True),  # each message is a value, and has one
        (LIST, b"\x0a\0", MAX_VALUES // 2 + 1, False),
        (LIST, b"\x0a\0" * (MAX_VALUES - 1), 1, True),
        (LIST, b"\x0a\0" * MAX_VALUES, 1, False),
    ],
)
def test_values_of_all_messages_are_limited(message_type: Descriptor, unit: bytes, count: int, is_fit: bool) -> None:
    body = frame(*[unit] * count)

    converted = convert(body, message_type=message_type, is_stream=True)
    assert converted.is_fit is is_fit
    if not is_fit:
        assert orjson.loads(converted.json) == f"{len(body)} bytes, digest of {len(body)}"


def test_size_of_the_json_is_limited() -> None:
    text = "\x01" * (MAX_JSON_BYTES // 6 // 2)  # six characters each in JSON
    once, twice = (frame(*[make_product(password=text).SerializeToString()] * count) for count in (1, 2))

    assert convert(once, is_stream=True).is_fit
    converted = convert(twice, is_stream=True)
    assert (converted.is_fit, len(converted.json) < 100) == (False, True)


def test_text_that_is_no_utf8_is_unfit_although_proto2_accepts_it() -> None:
    pool = parse_descriptor_set(compile_descriptors(PROTO2))
    message_type = pool.FindMessageTypeByName("shop.v1.Row")

    converted = convert(frame(b"\x0a\x02\xff\xfe"), message_type=message_type)
    assert converted == ConvertedBody(b'"4 bytes, digest of 4"', False, False)


def test_message_of_a_stream_that_does_not_fit_leaves_the_others() -> None:
    body = frame(make_product(stock=1).SerializeToString(), b"\x0a\x7f", make_product(stock=2).SerializeToString())

    lines = [orjson.loads(line) for line in convert(body, is_stream=True).json.splitlines()]
    assert [lines[0]["stock"], lines[1], lines[2]["stock"]] == [1, "2 bytes, digest of 2", 2]


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_any_bytes_are_converted(body: bytes, is_stream: bool, is_truncated: bool) -> None:
    converted = convert(body, "gzip", is_stream=is_stream, is_truncated=is_truncated)

    for line in converted.json.splitlines():
        orjson.loads(line)


def answer(content: bytes, content_type: str = "application/grpc", digest: str = "") -> Answer:
    return Answer(200, (("content-type", content_type),), Body(b"" if digest else content, len(content), digest))


def test_body_that_was_converted_for_one_version_only_is_not_compared() -> None:
    converted, digest = answer(b'{"a":1}', "application/grpc+json"), answer(b"1234", digest="hmac:0:1")

    result = compare_bodies(converted, digest, OPTIONS)
    assert (result.differences, result.is_unreadable) == ([], True)
    too_long = answer(b"1234", digest="envoy:1")
    assert compare_bodies(converted, too_long, OPTIONS).differences
    [difference] = compare_bodies(converted, answer(b'{"a":2}', "application/grpc+json"), OPTIONS).differences
    assert (difference.path, difference.kind) == ("$.a", "changed")


def test_method_is_found_by_its_path() -> None:
    method = find_method(shop_pool(), "/shop.v1.ShopService/ListProducts")

    assert method is not None
    assert (method.input_type.name, method.output_type.name, method.server_streaming) == (
        "ProductRequest",
        "Product",
        True,
    )
    for path in ("/shop.v1.ShopService/Nothing", "/shop.v1.Product/GetProduct", "/", "", "/a/b/c", "/é.Ü/x"):
        assert find_method(shop_pool(), path) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no descriptors \xff", "it is no descriptor set, such as protoc --descriptor_set_out writes"),
        (b"", "it has no service"),
        (
            compile_descriptors(with_imports=False),
            "it lacks google/protobuf/any.proto, which shop.proto imports: write it with --include_imports",
        ),
        (compile_descriptors().replace(b".shop.v1.ProductRequest", b".shop.v1.ProductUnknown"), "its file shop.proto is not valid"),
    ],
)  # fmt: skip
def test_descriptor_set_with_an_error_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(DescriptorError, match=f"^{re.escape(problem)}"):
        parse_descriptor_set(content)


def test_configuration_names_the_descriptor_set_that_is_not_valid(tmp_path: Path) -> None:
    path = tmp_path / "shop.pb"
    config = write_config(tmp_path / "abreast.yaml", 1, 2, str(path))
    with pytest.raises(SettingError, match=rf"abreast.yaml:10: sidecar.descriptors .*{path}: No such file"):
        load_config(config)
    path.write_bytes(PROTO.read_bytes())
    with pytest.raises(SettingError, match=rf"sidecar.descriptors .*{path}: it is no descriptor set"):
        load_config(config)
    path.write_bytes(compile_descriptors())

    assert load_config(config).build_environment({})["ABREAST_DESCRIPTORS"] == str(path)
    with pytest.raises(SettingError, match=r"ABREAST_DESCRIPTORS .*\(grpc://shop: no address with a port\)"):
        CollectorSettings.from_environment({"ABREAST_DESCRIPTORS": "grpc://shop"})
