"""Standard Webhooks (https://www.standardwebhooks.com): three headers and a symmetric signature."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

SECRET_PREFIX = "whsec_"
SIGNATURE_SCHEME = "v1"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64  # bytes of a secret
TIMESTAMP_TOLERANCE_S = 300  # seconds between the signature's time and now


def decode_secret(secret: str) -> bytes:
    """Raise ValueError, which never tells the secret."""
    requirement = f"{SECRET_PREFIX} and {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes in base64"
    if not secret.startswith(SECRET_PREFIX):
        raise ValueError(requirement)
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(requirement) from None
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(requirement)
    return key


def make_signature_headers(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """`timestamp` (Unix, seconds) is that of the attempt; `message` is the same at every attempt."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"{SIGNATURE_SCHEME},{_sign(secret, message_id, str(timestamp), body)}",
    }


def is_verified(secret: str, request_headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether a message is from who has the secret, and fresh. `received` are headers, in small letters."""
    message_id, timestamp = (
        request_headers.get("webhook-id", ""),
        request_headers.get("webhook-timestamp", ""),
    )
    if not message_id or not timestamp.isdigit() or abs(now - int(timestamp)) > TIMESTAMP_TOLERANCE_S:
        return False
    expected = f"{SIGNATURE_SCHEME},{_sign(secret, message_id, timestamp, body)}".encode()
    signatures = request_headers.get("webhook-signature", "").split(" ")  # several while a secret is changed
    return any(hmac.compare_digest(expected, signature.encode()) for signature in signatures)


def _sign(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    payload = f"{message_id}.{timestamp}.".encode() + body
    return base64.b64encode(hmac.digest(decode_secret(secret), payload, hashlib.sha256)).decode()
