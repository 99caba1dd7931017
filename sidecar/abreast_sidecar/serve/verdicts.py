"""Verdicts as messages of the API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from abreast.v1 import common_pb2
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.serve.values import to_enum_number
from abreast_sidecar.stats.verdict import Budget, Reason, Verdict

VERDICT_STATE_ENUM = pb.VerdictState.DESCRIPTOR
VERDICT_SUBJECT_ENUM = pb.VerdictSubject.DESCRIPTOR


def to_verdict_response(service: str, verdict: Verdict, budget: Budget) -> pb.GetVerdictResponse:
    return pb.GetVerdictResponse(
        service=service,
        state=to_enum_number(VERDICT_STATE_ENUM, verdict.state),  # type: ignore[arg-type]  # an int is one
        reasons=_to_reason_messages(service, verdict.reasons),
        endpoints=[
            pb.EndpointVerdict(
                endpoint=_parse_endpoint_name(service, item.endpoint),
                state=to_enum_number(VERDICT_STATE_ENUM, item.state),  # type: ignore[arg-type]  # an int is one
                reasons=_to_reason_messages(service, item.reasons),
            )
            for item in verdict.endpoints
        ],
        pairs_needed=verdict.pairs_to_pass,
        budget=pb.Budget(**asdict(budget)),
        release=verdict.release,
    )


def _to_reason_messages(service: str, reasons: Iterable[Reason]) -> list[pb.VerdictReason]:
    return [
        pb.VerdictReason(
            subject=to_enum_number(VERDICT_SUBJECT_ENUM, reason.subject),  # type: ignore[arg-type]  # an int is one
            endpoint=_parse_endpoint_name(service, reason.endpoint) if reason.endpoint else None,
            state=to_enum_number(VERDICT_STATE_ENUM, reason.state),  # type: ignore[arg-type]  # an int is one
            text=reason.text,
            pairs_to_pass=reason.pairs_needed.to_pass,
            pairs_to_fail=reason.pairs_needed.to_fail,
        )
        for reason in reasons
    ]


def _parse_endpoint_name(service: str, name: str) -> common_pb2.Endpoint:
    method, _, route = name.partition(" ")
    return common_pb2.Endpoint(service=service, method=method, route=route)
