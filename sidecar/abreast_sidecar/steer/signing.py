"""Standard Webhooks (https://www.standardwebhooks.com): three headers and a symmetric signature."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

PREFIX = "whsec_"
SCHEME = "v1"
SHORTEST, LONGEST = 24, 64  # bytes of a secret
TOLERANCE = 300  # seconds between the signature's time and now


def key_of(secret: str) -> bytes:
    """Raise ValueError, which never tells the secret."""
    wanted = f"{PREFIX} and {SHORTEST} to {LONGEST} bytes in base64"
    if not secret.startswith(PREFIX):
        raise ValueError(wanted)
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(wanted) from None
    if not SHORTEST <= len(key) <= LONGEST:
        raise ValueError(wanted)
    return key


def headers(secret: str, message: str, timestamp: int, body: bytes) -> dict[str, str]:
    """`timestamp` (Unix, seconds) is that of the attempt; `message` is the same at every attempt."""
    return {
        "webhook-id": message,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"{SCHEME},{_signature(secret, message, str(timestamp), body)}",
    }


def verified(secret: str, received: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether a message is from who has the secret, and fresh. `received` are headers, in small letters."""
    message, timestamp = received.get("webhook-id", ""), received.get("webhook-timestamp", "")
    if not message or not timestamp.isdigit() or abs(now - int(timestamp)) > TOLERANCE:
        return False
    wanted = f"{SCHEME},{_signature(secret, message, timestamp, body)}".encode()
    said = received.get("webhook-signature", "").split(" ")  # several while a secret is changed
    return any(hmac.compare_digest(wanted, one.encode()) for one in said)


def _signature(secret: str, message: str, timestamp: str, body: bytes) -> str:
    signed = f"{message}.{timestamp}.".encode() + body
    return base64.b64encode(hmac.digest(key_of(secret), signed, hashlib.sha256)).decode()
