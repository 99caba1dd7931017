"""A self-signed certificate for tests, made here so that no private key lies in the repository.

ECDSA over P-256 (SEC 1, FIPS 186-5) and X.509 (RFC 5280) in their smallest form; nothing that protects anyone.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from pathlib import Path
from typing import NamedTuple

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
EC_PUBLIC_KEY, P256 = "1.2.840.10045.2.1", "1.2.840.10045.3.1.7"
ECDSA_SHA256 = "1.2.840.10045.4.3.2"
COMMON_NAME, SUBJECT_ALT_NAME, BASIC_CONSTRAINTS = "2.5.4.3", "2.5.29.17", "2.5.29.19"

Point = tuple[int, int] | None


class Certificate(NamedTuple):
    certificate: Path
    key: Path


def self_signed(folder: Path, name: str) -> Certificate:
    """Write a certificate for a DNS name, valid until 2049, and its key, as PEM files."""
    private = secrets.randbelow(N - 1) + 1
    point = _multiply(private, G)
    assert point is not None
    public = b"\x04" + point[0].to_bytes(32, "big") + point[1].to_bytes(32, "big")
    to_sign = _to_be_signed(name, public)
    signed = _sequence(to_sign, _sequence(_oid(ECDSA_SHA256)), _bits(_sign(private, to_sign)))
    curve = _tagged(0xA0, _oid(P256))
    key = _sequence(_integer(1), _tagged(0x04, private.to_bytes(32, "big")), curve, _tagged(0xA1, _bits(public)))
    certificate = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    certificate.certificate.write_text(_pem("CERTIFICATE", signed))
    certificate.key.write_text(_pem("EC PRIVATE KEY", key))
    return certificate


def _to_be_signed(name: str, public: bytes) -> bytes:
    subject = _sequence(_tagged(0x31, _sequence(_oid(COMMON_NAME), _tagged(0x0C, name.encode()))))
    valid = _sequence(_tagged(0x17, b"200101000000Z"), _tagged(0x17, b"491231235959Z"))
    key = _sequence(_sequence(_oid(EC_PUBLIC_KEY), _oid(P256)), _bits(public))
    names = _sequence(_oid(SUBJECT_ALT_NAME), _tagged(0x04, _sequence(_tagged(0x82, name.encode()))))
    authority = _sequence(_oid(BASIC_CONSTRAINTS), _tagged(0x04, _sequence(_tagged(0x01, b"\xff"))))
    version, serial = _tagged(0xA0, _integer(2)), _integer(secrets.randbits(63))
    extensions = _tagged(0xA3, _sequence(names, authority))
    return _sequence(version, serial, _sequence(_oid(ECDSA_SHA256)), subject, valid, subject, key, extensions)


def _sign(private: int, message: bytes) -> bytes:
    digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
    while True:
        nonce = secrets.randbelow(N - 1) + 1
        point = _multiply(nonce, G)
        assert point is not None
        r = point[0] % N
        s = pow(nonce, -1, N) * (digest + r * private) % N
        if r and s:
            return _sequence(_integer(r), _integer(s))


def _multiply(factor: int, point: Point) -> Point:
    total: Point = None
    while factor:
        if factor & 1:
            total = _add(total, point)
        point = _add(point, point)
        factor >>= 1
    return total


def _add(point: Point, other: Point) -> Point:
    if point is None or other is None:
        return point or other
    (x1, y1), (x2, y2) = point, other
    if x1 == x2 and (y1 + y2) % P == 0:
        return None
    slope = (3 * x1 * x1 - 3) * pow(2 * y1, -1, P) if point == other else (y2 - y1) * pow(x2 - x1, -1, P)
    x3 = (slope * slope - x1 - x2) % P
    return x3, (slope * (x1 - x3) - y1) % P


def _tagged(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _sequence(*parts: bytes) -> bytes:
    return _tagged(0x30, b"".join(parts))


def _integer(value: int) -> bytes:
    return _tagged(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _bits(content: bytes) -> bytes:
    return _tagged(0x03, b"\x00" + content)


def _oid(dotted: str) -> bytes:
    first, second, *others = map(int, dotted.split("."))
    encoded = bytearray([first * 40 + second])
    for number in others:
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(number & 0x7F | 0x80)
        encoded += bytes(reversed(groups))
    return _tagged(0x06, bytes(encoded))


def _pem(kind: str, content: bytes) -> str:
    text = base64.b64encode(content).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""])
