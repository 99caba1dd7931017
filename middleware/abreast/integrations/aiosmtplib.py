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

from abreast.effects import effect
from abreast.protocol.capture import digest

EFFECT_KIND = "email.send"
RECORDED_HEADERS = ("subject", "from", "reply-to", "content-language")  # headers that are recorded
Mail = Message | EmailMessage | str | bytes
SendResult = tuple[dict[str, SMTPResponse], str]


def make_accepted_result(*_: object, **__: object) -> SendResult:
    """What the server would say: nobody refused."""
    return {}, "held back"


def describe(message: Mail, /, **kwargs: Any) -> dict[str, Any]:
    """Who gets what. Message id, date and boundaries are left out: they differ each time."""
    parsed_message = _parse_mail(message)
    recipients = kwargs.get("recipients") or _get_addresses(parsed_message, "to", "cc", "bcc")
    sender = kwargs.get("sender") or next(iter(_get_addresses(parsed_message, "sender", "from")), "")
    return {
        "sender": sender,
        "recipients": sorted([recipients] if isinstance(recipients, str) else recipients),
        **{name: str(parsed_message[name]) for name in RECORDED_HEADERS if name in parsed_message},
        "parts": [_describe_part(part) for part in parsed_message.walk() if not part.is_multipart()],
    }


def _parse_mail(message: Mail) -> Message:
    """With the newer policy, which decodes headers."""
    raw = message.as_bytes() if isinstance(message, Message) else message
    return email.message_from_bytes(
        raw.encode("utf-8", "backslashreplace") if isinstance(raw, str) else raw, policy=default
    )


def _get_addresses(parsed_message: Message, *names: str) -> list[str]:
    fields = [str(field) for name in names for field in parsed_message.get_all(name, [])]
    return [address for _, address in getaddresses(fields) if address]


def _describe_part(part: Message) -> dict[str, Any]:
    content = part.get_payload(decode=True)
    raw = content if isinstance(content, bytes) else b""
    description: dict[str, Any] = {"type": part.get_content_type()}
    if part.get_filename():
        return {**description, "name": part.get_filename(), "length": len(raw), "digest": digest(raw)}
    if part.get_content_maintype() != "text":
        return {**description, "length": len(raw), "digest": digest(raw)}
    text = raw.decode(part.get_content_charset("utf-8"), "backslashreplace")
    return {**description, "text": text.replace("\r\n", "\n")}


# Without a connection in a shadow.
send = effect(EFFECT_KIND, describe, stand_in=make_accepted_result)(aiosmtplib.send)


class SMTP(aiosmtplib.SMTP):
    """Connects also in a shadow, and logs in. `send_message` comes through `sendmail` too."""

    async def sendmail(
        self, sender: str, recipients: str | Sequence[str], message: str | bytes, /, **options: Any
    ) -> SendResult:
        mail = effect(
            EFFECT_KIND,
            lambda *_, **__: describe(message, sender=sender, recipients=recipients),
            stand_in=make_accepted_result,
        )
        return await mail.run(super().sendmail, sender, recipients, message, **options)
