"""Signatures as Standard Webhooks has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.errors import SettingError
from abreast_sidecar.rollout.webhooks import decode_secret, is_verified, make_signature_headers
from abreast_sidecar.settings import Settings

SECRET = (
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # the vector that libraries of Standard Webhooks are tested with
)
SENT = 1614265330


def test_the_vector_of_the_scheme() -> None:
    made = make_signature_headers(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", SENT, b'{"test": 2432232314}')

    assert made == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": str(SENT),
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@given(st.binary(), st.binary())
def test_only_the_very_body_is_verified(body: bytes, other: bytes) -> None:
    made = make_signature_headers(SECRET, "msg_1", SENT, body)

    assert is_verified(SECRET, made, body, SENT)
    assert is_verified(SECRET, made, other, SENT) == (body == other)


def test_what_is_old_of_another_or_without_a_header_is_not() -> None:
    made = make_signature_headers(SECRET, "msg_1", SENT, b"{}")
    several = made | {"webhook-signature": "v1,AAAA " + made["webhook-signature"]}

    assert is_verified(SECRET, several, b"{}", SENT + 299)
    assert not is_verified(SECRET, made, b"{}", SENT + 301)
    assert not is_verified("whsec_" + "A" * 32, made, b"{}", SENT)
    assert not any(is_verified(SECRET, made | {name: ""}, b"{}", SENT) for name in made)


@pytest.mark.parametrize(
    "secret", ["hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64!", "whsec_" + "A" * 200]
)
def test_a_secret_that_is_none_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_ and 24 to 64 bytes in base64") as caught:
        decode_secret(secret)
    with pytest.raises(SettingError, match="ABREAST_WEBHOOK_SECRET must be whsec_ and 24") as told:
        Settings.from_environment({"ABREAST_WEBHOOK_SECRET": secret})

    assert secret == "whsec_" or secret not in f"{caught.value} {told.value}"


def test_receivers_without_a_secret_are_refused() -> None:
    with pytest.raises(SettingError, match="ABREAST_WEBHOOK_SECRET must be set"):
        Settings.from_environment({"ABREAST_WEBHOOK_URLS": "https://hooks.example.com/a"})


@pytest.mark.parametrize("url", ["hooks.example.com", "ftp://a/b", "https://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingError, match="ABREAST_WEBHOOK_URLS must be URLs such as"):
        Settings.from_environment({"ABREAST_WEBHOOK_URLS": url, "ABREAST_WEBHOOK_SECRET": SECRET})
