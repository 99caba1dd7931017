"""Detect that new failed a user's request and old answered it."""

from __future__ import annotations

from typing import Any

import pytest

from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.store.records import PairRecord
from captures import capture

OLD_COPY = capture("old", role="shadow")
OLD_AGAIN = capture("old", attempt=2)
NEW = capture("new", status=503)


@pytest.mark.parametrize(
    ("old", "new", "baseline", "wanted"),
    [
        (OLD_COPY, NEW, OLD_AGAIN, True),  # new answered 503
        (OLD_COPY, None, OLD_AGAIN, True),  # new never answered
        (OLD_AGAIN, None, OLD_COPY, True),
        (OLD_COPY, capture("new"), None, False),  # new answered
        (capture("old"), capture("new", role="shadow"), None, False),
        (OLD_AGAIN, capture("new", role="shadow", status=500), None, False),  # old itself was tried again
        (OLD_AGAIN, None, None, False),  # the order of attempts is unknown
    ],
)
def test_has_failed_over_detects_failover_from_captures(old: Any, new: Any, baseline: Any, wanted: bool) -> None:
    judgement = ComparisonResult(outcome="mismatch", method="GET", route="/", old=old, new=new, baseline=baseline)
    row = PairRecord("shop", "1-0", 1, "pair", judgement, ()).to_row(1)

    assert row.get("failed_over", False) is wanted
