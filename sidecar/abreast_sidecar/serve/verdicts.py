"""Verdicts as messages of the API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from abreast.v1 import common_pb2
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.compare.verdict import Budget, Ledger, Reason, Verdict
from abreast_sidecar.serve.values import number
from abreast_sidecar.store.results import Evidence

STATE = pb.VerdictState.DESCRIPTOR
SUBJECT = pb.VerdictSubject.DESCRIPTOR


def ledger(found: Evidence, pending: int) -> Ledger:
    """Of the window; what still waits in Redis is not lost, and not known either."""
    lost = found.lost(pending)
    sampled = None if lost is None else found.rows + lost
    return Ledger(sampled, found.accounted, waiting=0 if found.over else pending)


def response(
    service: str, verdict: Verdict, budget: Budget, release: str | None = None
) -> pb.GetVerdictResponse:
    """`release`: of new, that was judged; None for all."""
    return pb.GetVerdictResponse(
        service=service,
        state=number(STATE, verdict.state),  # type: ignore[arg-type]  # an int is one
        reasons=_reasons(service, verdict.reasons),
        endpoints=[
            pb.EndpointVerdict(
                endpoint=_endpoint(service, one.endpoint),
                state=number(STATE, one.state),  # type: ignore[arg-type]  # an int is one
                reasons=_reasons(service, one.reasons),
            )
            for one in verdict.endpoints
        ],
        more=verdict.more,
        budget=pb.Budget(**asdict(budget)),
        release=release,
    )


def _reasons(service: str, reasons: Iterable[Reason]) -> list[pb.VerdictReason]:
    return [
        pb.VerdictReason(
            subject=number(SUBJECT, one.subject),  # type: ignore[arg-type]  # an int is one
            endpoint=_endpoint(service, one.endpoint) if one.endpoint else None,
            state=number(STATE, one.state),  # type: ignore[arg-type]  # an int is one
            text=one.text,
            more_to_pass=one.needed.to_pass,
            more_to_fail=one.needed.to_fail,
        )
        for one in reasons
    ]


def _endpoint(service: str, name: str) -> common_pb2.Endpoint:
    method, _, route = name.partition(" ")
    return common_pb2.Endpoint(service=service, method=method, route=route)
