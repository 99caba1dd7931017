# ruff: noqa: ARG002, N802  # names and shapes are the API's
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abreast.v1 import rule_pb2 as pb
from abreast.v1 import rule_pb2_grpc
from abreast_sidecar.compare import Rule, Rules
from abreast_sidecar.errors import ArgumentError, BroadRuleError, NotFoundError
from abreast_sidecar.rejudge.places import Known
from abreast_sidecar.rejudge.preview import objections, preview
from abreast_sidecar.rejudge.write import known_findings
from abreast_sidecar.serve import arguments, rule_arguments
from abreast_sidecar.serve.rule_arguments import message
from abreast_sidecar.store import pages
from abreast_sidecar.store.rules import MAX_IN_FORCE, Draft, RuleFilter, RuleStore, StoredRule

MOST = 10  # objections in a message


class RuleControl(rule_pb2_grpc.RuleServiceServicer):
    def __init__(self, store: RuleStore, rules: Rules) -> None:
        """`rules`: what is set apart from what people declare."""
        self.store = store
        self.rules = rules

    async def CreateRule(self, request: pb.CreateRuleRequest, context: Any) -> pb.CreateRuleResponse:
        actor = rule_arguments.actor(request, context.peer())
        rule, known = await self._wanted(request)
        draft = rule_arguments.draft(request.rule, rule)
        if not request.force:
            hides = await preview(self.store.database, self.rules, rule)
            refuse(objections(hides, rule, known))
        (number,) = await self.store.change([draft], [], actor)
        return pb.CreateRuleResponse(rule=message(await self.store.get(number)))

    async def ListRules(self, request: pb.ListRulesRequest, context: Any) -> pb.ListRulesResponse:
        page = arguments.page(request)
        source = arguments.text("source", request.source) if request.HasField("source") else None
        finding = arguments.finding_id("finding_id", request.finding_id, least=0)
        filters = {"source": source, "finding_id": finding, "include_deleted": request.include_deleted}
        after = pages.decode("rules", filters, page.token)[0] if page.token else None
        wanted = RuleFilter(source, finding, include_ended=request.include_deleted)
        found = await self.store.listed(wanted, after=after, limit=page.size + 1)
        shown = found[: page.size]
        token = pages.encode("rules", filters, [shown[-1].id]) if len(found) > page.size else ""
        return pb.ListRulesResponse(rules=[message(one) for one in shown], next_page_token=token)

    async def DeleteRule(self, request: pb.DeleteRuleRequest, context: Any) -> pb.DeleteRuleResponse:
        actor = rule_arguments.actor(request, context.peer())
        if request.id < 1:
            raise ArgumentError(f"id must be a rule's id from ListRules, got {request.id}")
        return pb.DeleteRuleResponse(rule=message(await self.store.delete(request.id, actor)))

    async def PreviewRule(self, request: pb.PreviewRuleRequest, context: Any) -> pb.PreviewRuleResponse:
        rule, known = await self._wanted(request)
        hides = await preview(self.store.database, self.rules, rule)
        return pb.PreviewRuleResponse(
            rule=rule_arguments.spec(rule),
            findings=[rule_arguments.hidden(one) for one in hides],
            objections=objections(hides, rule, known),
        )

    async def ApplyRules(self, request: pb.ApplyRulesRequest, context: Any) -> pb.ApplyRulesResponse:
        actor, source = rule_arguments.actor(request, context.peer()), rule_arguments.source(request)
        drafts = rule_arguments.drafts(request.rules, source)
        held = await self.store.listed(
            RuleFilter(source=source, include_expired=False), limit=MAX_IN_FORCE + 1
        )
        kept = [one for one in held if one.draft in drafts]
        gone = [one for one in held if one.draft not in drafts]
        known = [one.draft for one in kept]
        new = [draft for draft in drafts if draft not in known]
        against = [] if request.force else await self._against(new)
        if request.dry_run:
            return _applied([rule_arguments.spec_of(one) for one in new], gone, kept, against)
        refuse(against)
        made = await self.store.change(new, [one.id for one in gone], actor)
        created = await self.store.listed(ids=made, limit=len(made)) if made else []
        return _applied([message(one) for one in created], gone, kept, against)

    async def _against(self, drafts: Sequence[Draft]) -> list[str]:
        found = []
        for draft in drafts:
            hides = await preview(self.store.database, self.rules, draft.rule)
            found += [f"rule {draft.rule.name!r}: {why}" for why in objections(hides, draft.rule, None)]
        return found

    async def _wanted(self, request: Any) -> tuple[Rule, Known | None]:
        """The rule of a request, fitted to the finding that it is made for."""
        number = arguments.finding_id("finding_id", request.finding_id, least=0)
        if not number:
            return rule_arguments.rule(request.rule), None
        if request.rule.action == pb.RULE_ACTION_WAIVE_COVERAGE:
            raise ArgumentError("finding_id must be left out: what waives coverage explains no finding")
        async with self.store.database.connection() as connection:
            known = (await known_findings(connection, [number])).get(number)
        if known is None:
            raise NotFoundError(
                f"the ledger holds no finding {number} of single pairs; list them with ListFindings"
            )
        rule = rule_arguments.fitted_rule(request.rule, known)
        if not (
            rule.applies_to(known.service, known.endpoint)
            and rule.touches(known.part, known.path, known.kind)
        ):
            raise ArgumentError(
                f"the rule does not cover finding {number} ({known.part} {known.path} {known.kind} of "
                f"{known.endpoint}); leave out what limits it otherwise, or choose another action"
            )
        return rule, known


def refuse(against: Sequence[str]) -> None:
    if against:
        more = f"; and {len(against) - MOST} more" if len(against) > MOST else ""
        raise BroadRuleError(
            f"the rule is broader than what it is made for: {'; '.join(against[:MOST])}{more}. "
            "Narrow it, or force it if all this is meant"
        )


def _applied(
    created: Sequence[pb.Rule],
    gone: Sequence[StoredRule],
    kept: Sequence[StoredRule],
    against: Sequence[str],
) -> pb.ApplyRulesResponse:
    return pb.ApplyRulesResponse(
        created=created,
        deleted=[message(one) for one in gone],
        unchanged=[message(one) for one in kept],
        objections=against,
    )
