"""aiosmtplib for services that receive shadow requests: mails are recorded, and held back in shadows.

`send` and `SMTP` replace those of aiosmtplib.
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

from abreast.effects import effect
from abreast.protocol.capture import digest

EFFECT_KIND = "email.send"
RECORDED_HEADERS = ("subject", "from", "reply-to", "content-language")
Mail = Message | EmailMessage | str | bytes
SendResult = tuple[dict[str, SMTPResponse], str]


def make_accepted_result(*_: object, **__: object) -> SendResult:
    """Return the result of a server that accepts all recipients."""
    return {}, "held back"


def describe(message: Mail, /, **kwargs: Any) -> dict[str, Any]:
    """Return the payload of a mail, without message ID, date and boundaries, which differ on every request."""
    raw = message.as_bytes() if isinstance(message, Message) else message
    raw = raw.encode("utf-8", "backslashreplace") if isinstance(raw, str) else raw
    mail = email.message_from_bytes(raw, policy=default)  # this policy decodes headers
    recipients = kwargs.get("recipients") or _get_addresses(mail, "to", "cc", "bcc")
    sender = kwargs.get("sender") or next(iter(_get_addresses(mail, "sender", "from")), "")
    return {
        "sender": sender,
        "recipients": sorted([recipients] if isinstance(recipients, str) else recipients),
        **{name: str(mail[name]) for name in RECORDED_HEADERS if name in mail},
        "parts": [_describe_part(part) for part in mail.walk() if not part.is_multipart()],
    }


def _get_addresses(mail: Message, *names: str) -> list[str]:
    fields = [str(field) for name in names for field in mail.get_all(name, [])]
    return [address for _, address in getaddresses(fields) if address]


def _describe_part(part: Message) -> dict[str, Any]:
    content = part.get_payload(decode=True)
    raw = content if isinstance(content, bytes) else b""
    description: dict[str, Any] = {"type": part.get_content_type()}
    if name := part.get_filename():
        description["name"] = name
    if name or part.get_content_maintype() != "text":
        return {**description, "length": len(raw), "digest": digest(raw)}
    text = raw.decode(part.get_content_charset("utf-8"), "backslashreplace")
    return {**description, "text": text.replace("\r\n", "\n")}


# A shadow opens no connection.
send = effect(EFFECT_KIND, describe, stand_in=make_accepted_result)(aiosmtplib.send)


class SMTP(aiosmtplib.SMTP):
    """A client that connects and logs in also in shadows. `send_message` calls `sendmail`."""

    async def sendmail(
        self, sender: str, recipients: str | Sequence[str], message: str | bytes, /, **options: Any
    ) -> SendResult:
        mail = effect(
            EFFECT_KIND,
            lambda *_, **__: describe(message, sender=sender, recipients=recipients),
            stand_in=make_accepted_result,
        )
        return await mail.run(super().sendmail, sender, recipients, message, **options)
