"""Completeness checks of the guard."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from abreast_sidecar.rollout.completeness import CompletenessGap
from abreast_sidecar.rollout.guard import GuardPolicy
from abreast_sidecar.rollout.leader_tasks import GuardController
from abreast_sidecar.rollout.transitions import Guard

GUARD = Guard("shop", GuardPolicy("acting", min_completeness=0.9), None, {}, "clear", "", None, None)


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], str]:
    """Check once per second. Arguments: requests by Envoy's count, and requests in the ledger."""
    clock = [1000.0]
    monkeypatch.setattr("abreast_sidecar.rollout.leader_tasks.time.monotonic", lambda: clock[0])
    controller = GuardController(None, None, None, (), None)  # type: ignore[arg-type]  # only its memory is used

    def observe(sampled: int, pair_count: int) -> str:
        clock[0] += 1
        return controller._check_completeness(GUARD, CompletenessGap(sampled, pair_count))

    return observe


def test_guard_is_not_blind_with_a_lagging_ledger(look: Callable[[int, int], str]) -> None:
    assert not any(look(100 * second, 100 * (second - 3)) for second in range(3, 200))


def test_guard_is_blind_seconds_after_captures_stop(look: Callable[[int, int], str]) -> None:
    for second in range(30):
        assert not look(100 * second, 100 * second)

    texts = [look(3000 + 100 * second, 3000) for second in range(20)]

    assert texts[-1].startswith("the ledger has ")
    assert texts.index(next(text for text in texts if text)) <= 12


def test_guard_recovers_a_minute_after_a_gap(look: Callable[[int, int], str]) -> None:
    texts = [look(100 * second, 100 * min(second, 30)) for second in range(60)]
    after = [look(6000 + 100 * second, 3000 + 100 * second) for second in range(90)]

    assert texts[-1]
    assert not any(after[70:])


def test_guard_is_not_blind_with_few_requests(look: Callable[[int, int], str]) -> None:
    assert not any(look(second, 0) for second in range(40))
