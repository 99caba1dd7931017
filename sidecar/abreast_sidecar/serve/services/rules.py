"""RuleService."""

# ruff: noqa: ARG002, N802  # gRPC gives the signatures and names

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abreast.v1 import rule_pb2 as pb
from abreast.v1 import rule_pb2_grpc
from abreast_sidecar.compare.rules import CompareOptions, Rule
from abreast_sidecar.errors import ArgumentError, NotFoundError, OverbroadRuleError
from abreast_sidecar.rules.attribution import FindingRef
from abreast_sidecar.rules.preview import list_objections, preview_rule
from abreast_sidecar.rules.reapply import load_findings
from abreast_sidecar.serve import rule_arguments, validate
from abreast_sidecar.serve.rule_arguments import to_stored_rule_message
from abreast_sidecar.store.reader import decode_cursor, encode_cursor
from abreast_sidecar.store.rules import MAX_ACTIVE_RULES, RuleDraft, RuleFilter, RuleStore

MAX_LISTED_OBJECTIONS = 10  # in an error message


class RuleServicer(rule_pb2_grpc.RuleServiceServicer):
    def __init__(self, store: RuleStore, base_rules: CompareOptions) -> None:
        """`base_rules`: the options from settings, which apply besides the rules of the ledger."""
        self.store = store
        self.base_rules = base_rules

    async def CreateRule(self, request: pb.CreateRuleRequest, context: Any) -> pb.CreateRuleResponse:
        actor = validate.parse_actor(request, context.peer())
        rule, finding = await self._parse_rule(request)
        draft = rule_arguments.parse_draft(request.rule, rule)
        if not request.force:
            previews = await preview_rule(self.store.database, self.base_rules, rule)
            raise_if_overbroad(list_objections(previews, rule, finding))
        (rule_id,) = await self.store.replace_rules([draft], [], actor)
        return pb.CreateRuleResponse(rule=to_stored_rule_message(await self.store.get(rule_id)))

    async def ListRules(self, request: pb.ListRulesRequest, context: Any) -> pb.ListRulesResponse:
        page = validate.parse_page(request)
        source = validate.check_text("source", request.source) if request.HasField("source") else None
        finding_id = validate.check_finding_id("finding_id", request.finding_id, minimum=0)
        filters = {"source": source, "finding_id": finding_id, "include_deleted": request.include_deleted}
        after_id = decode_cursor("rules", filters, page.token)[0] if page.token else None
        rule_filter = RuleFilter(source, finding_id, include_ended=request.include_deleted)
        rules = await self.store.list_rules(rule_filter, after_id=after_id, limit=page.size + 1)
        is_last = len(rules) <= page.size
        return pb.ListRulesResponse(
            rules=[to_stored_rule_message(rule) for rule in rules[: page.size]],
            next_page_token="" if is_last else encode_cursor("rules", filters, [rules[page.size - 1].id]),
        )

    async def DeleteRule(self, request: pb.DeleteRuleRequest, context: Any) -> pb.DeleteRuleResponse:
        actor = validate.parse_actor(request, context.peer())
        if request.id < 1:
            raise ArgumentError(f"id must be the id of a rule from ListRules, got {request.id}")
        return pb.DeleteRuleResponse(rule=to_stored_rule_message(await self.store.delete(request.id, actor)))

    async def PreviewRule(self, request: pb.PreviewRuleRequest, context: Any) -> pb.PreviewRuleResponse:
        rule, finding = await self._parse_rule(request)
        previews = await preview_rule(self.store.database, self.base_rules, rule)
        return pb.PreviewRuleResponse(
            rule=rule_arguments.to_rule_message(rule),
            findings=[rule_arguments.to_hidden_finding_message(preview) for preview in previews],
            objections=list_objections(previews, rule, finding),
        )

    async def ApplyRules(self, request: pb.ApplyRulesRequest, context: Any) -> pb.ApplyRulesResponse:
        actor, source = validate.parse_actor(request, context.peer()), rule_arguments.parse_source(request)
        drafts = rule_arguments.parse_drafts(request.rules, source)
        active_rules = await self.store.list_rules(
            RuleFilter(source=source, include_expired=False), limit=MAX_ACTIVE_RULES + 1
        )
        unchanged = [rule for rule in active_rules if rule.draft in drafts]
        deleted = [rule for rule in active_rules if rule.draft not in drafts]
        unchanged_drafts = [rule.draft for rule in unchanged]
        new_drafts = [draft for draft in drafts if draft not in unchanged_drafts]
        objections = [] if request.force else await self._collect_objections(new_drafts)
        if request.dry_run:
            created = [rule_arguments.to_draft_message(draft) for draft in new_drafts]
        else:
            raise_if_overbroad(objections)
            ids = await self.store.replace_rules(new_drafts, [rule.id for rule in deleted], actor)
            created_rules = await self.store.list_rules(ids=ids, limit=len(ids)) if ids else []
            created = [to_stored_rule_message(rule) for rule in created_rules]
        return pb.ApplyRulesResponse(
            created=created,
            deleted=[to_stored_rule_message(rule) for rule in deleted],
            unchanged=[to_stored_rule_message(rule) for rule in unchanged],
            objections=objections,
        )

    async def _collect_objections(self, drafts: Sequence[RuleDraft]) -> list[str]:
        objections = []
        for draft in drafts:
            previews = await preview_rule(self.store.database, self.base_rules, draft.rule)
            objections += [
                f"rule {draft.rule.name!r}: {objection}" for objection in list_objections(previews, draft.rule, None)
            ]
        return objections

    async def _parse_rule(self, request: Any) -> tuple[Rule, FindingRef | None]:
        """Read the rule of a request, narrowed to its finding."""
        finding_id = validate.check_finding_id("finding_id", request.finding_id, minimum=0)
        if not finding_id:
            return rule_arguments.parse_rule(request.rule), None
        if request.rule.action == pb.RULE_ACTION_WAIVE_COVERAGE:
            raise ArgumentError("finding_id must be unset: a rule that waives coverage explains no finding")
        async with self.store.database.connection() as connection:
            finding = (await load_findings(connection, [finding_id])).get(finding_id)
        if finding is None:
            raise NotFoundError(
                f"the ledger has no finding {finding_id} of single pairs; list the findings with ListFindings"
            )
        rule = rule_arguments.parse_narrowed_rule(request.rule, finding)
        if not (
            rule.applies_to(finding.service, finding.endpoint)
            and rule.may_match(finding.part, finding.path, finding.kind)
        ):
            raise ArgumentError(
                f"the rule does not cover finding {finding_id} ({finding.part} {finding.path} {finding.kind} of "
                f"{finding.endpoint}); remove the conditions that exclude it, or choose another action"
            )
        return rule, finding


def raise_if_overbroad(objections: Sequence[str]) -> None:
    if not objections:
        return
    more = len(objections) - MAX_LISTED_OBJECTIONS
    raise OverbroadRuleError(
        f"the rule is too broad: {'; '.join(objections[:MAX_LISTED_OBJECTIONS])}"
        f"{f'; and {more} more' if more > 0 else ''}. Narrow it, or use force if you want all of this"
    )
