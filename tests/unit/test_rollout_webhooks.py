"""Signatures of Standard Webhooks."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from abreast_sidecar.errors import SettingError
from abreast_sidecar.rollout.webhooks import make_signature_headers
from abreast_sidecar.settings import Settings

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # the vector that libraries of Standard Webhooks are tested with
SENT = datetime.fromtimestamp(1614265330, UTC)


def test_signature_matches_the_reference_vector() -> None:
    headers = make_signature_headers(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", SENT, b'{"test": 2432232314}')

    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_make_signature_headers_verifies_only_for_its_body_and_secret() -> None:
    headers = make_signature_headers(SECRET, "msg_1", datetime.now(UTC), '{"reason": "größer"}'.encode())

    Webhook(SECRET).verify('{"reason": "größer"}', headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify('{"reason": "other"}', headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify('{"reason": "größer"}', headers)


@pytest.mark.parametrize("secret", ["hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64!", "whsec_" + "A" * 200])
def test_webhook_secret_rejects_invalid_values_without_showing_them(secret: str) -> None:
    with pytest.raises(SettingError, match="ABREAST_WEBHOOK_SECRET must be whsec_ and 24") as error:
        Settings.from_environment({"ABREAST_WEBHOOK_SECRET": secret})

    assert secret == "whsec_" or secret not in str(error.value)


def test_webhook_urls_require_a_secret() -> None:
    with pytest.raises(SettingError, match="ABREAST_WEBHOOK_SECRET must be set"):
        Settings.from_environment({"ABREAST_WEBHOOK_URLS": "https://hooks.example.com/a"})


@pytest.mark.parametrize("url", ["hooks.example.com", "ftp://a/b", "https://"])
def test_webhook_urls_reject_other_text(url: str) -> None:
    with pytest.raises(SettingError, match="ABREAST_WEBHOOK_URLS must be URLs such as"):
        Settings.from_environment({"ABREAST_WEBHOOK_URLS": url, "ABREAST_WEBHOOK_SECRET": SECRET})
