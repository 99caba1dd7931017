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
    now = [1000.0]
    monkeypatch.setattr("abreast_sidecar.rollout.leader_tasks.time.monotonic", lambda: now[0])
    made = GuardController(None, None, None, ())  # type: ignore[arg-type]  # only its memory is used

    def one(sampled: int, arrived: int) -> str:
        now[0] += 1
        return made._check_completeness(GUARD, CompletenessGap(sampled, arrived))

    return one


def test_guard_is_not_blind_with_a_lagging_ledger(look: Callable[[int, int], str]) -> None:
    assert not any(look(100 * second, 100 * (second - 3)) for second in range(3, 200))


def test_guard_is_blind_seconds_after_captures_stop(look: Callable[[int, int], str]) -> None:
    for second in range(30):
        assert not look(100 * second, 100 * second)

    said = [look(3000 + 100 * second, 3000) for second in range(20)]

    assert said[-1].startswith("the ledger has ")
    assert said.index(next(one for one in said if one)) <= 12


def test_guard_recovers_a_minute_after_a_gap(look: Callable[[int, int], str]) -> None:
    told = [look(100 * second, 100 * min(second, 30)) for second in range(60)]
    after = [look(6000 + 100 * second, 3000 + 100 * second) for second in range(90)]

    assert told[-1]
    assert not any(after[70:])


def test_guard_is_not_blind_with_few_requests(look: Callable[[int, int], str]) -> None:
    assert not any(look(second, 0) for second in range(40))
