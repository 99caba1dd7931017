"""Mails that a service sends with aiosmtplib: held back in a shadow, and recorded in both versions.

`send` and `SMTP` take the place of aiosmtplib's own.
"""

from __future__ import annotations

import email
from collections.abc import Sequence
from email.message import EmailMessage, Message
from email.policy import default
from email.utils import getaddresses
from typing import Any

import aiosmtplib
from aiosmtplib import SMTPResponse

from abreast.capture import digest
from abreast.effects import effect

KIND = "email.send"
NAMED = ("subject", "from", "reply-to", "content-language")  # headers that are recorded
Mail = Message | EmailMessage | str | bytes
Sent = tuple[dict[str, SMTPResponse], str]


def held(*_: object, **__: object) -> Sent:
    """What the server would say: nobody refused."""
    return {}, "held back"


def said(message: Mail, /, **given: Any) -> dict[str, Any]:
    """Who gets what. Message id, date and boundaries are left out: they differ each time."""
    parsed = _parsed(message)
    recipients = given.get("recipients") or _addresses(parsed, "to", "cc", "bcc")
    sender = given.get("sender") or next(iter(_addresses(parsed, "sender", "from")), "")
    return {
        "sender": sender,
        "recipients": sorted([recipients] if isinstance(recipients, str) else recipients),
        **{name: str(parsed[name]) for name in NAMED if name in parsed},
        "parts": [_part(part) for part in parsed.walk() if not part.is_multipart()],
    }


def _parsed(message: Mail) -> Message:
    """With the newer policy, which decodes headers."""
    raw = message.as_bytes() if isinstance(message, Message) else message
    return email.message_from_bytes(
        raw.encode("utf-8", "backslashreplace") if isinstance(raw, str) else raw, policy=default
    )


def _addresses(parsed: Message, *names: str) -> list[str]:
    fields = [str(field) for name in names for field in parsed.get_all(name, [])]
    return [address for _, address in getaddresses(fields) if address]


def _part(part: Message) -> dict[str, Any]:
    content = part.get_payload(decode=True)
    raw = content if isinstance(content, bytes) else b""
    found: dict[str, Any] = {"type": part.get_content_type()}
    if part.get_filename():
        return {**found, "name": part.get_filename(), "length": len(raw), "digest": digest(raw)}
    if part.get_content_maintype() != "text":
        return {**found, "length": len(raw), "digest": digest(raw)}
    text = raw.decode(part.get_content_charset("utf-8"), "backslashreplace")
    return {**found, "text": text.replace("\r\n", "\n")}


# Without a connection in a shadow.
send = effect(KIND, said, stand_in=held)(aiosmtplib.send)


class SMTP(aiosmtplib.SMTP):
    """Connects also in a shadow, and logs in. `send_message` comes through `sendmail` too."""

    async def sendmail(
        self, sender: str, recipients: str | Sequence[str], message: str | bytes, /, **options: Any
    ) -> Sent:
        mail = effect(
            KIND, lambda *_, **__: said(message, sender=sender, recipients=recipients), stand_in=held
        )
        return await mail.run(super().sendmail, sender, recipients, message, **options)
