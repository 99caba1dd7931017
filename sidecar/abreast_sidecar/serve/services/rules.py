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
from abreast_sidecar.serve import rule_arguments
from abreast_sidecar.serve import validate as arguments
from abreast_sidecar.serve.rule_arguments import to_stored_rule_message
from abreast_sidecar.store import reader as pages
from abreast_sidecar.store.rules import MAX_ACTIVE_RULES, RuleDraft, RuleFilter, RuleStore, StoredRule

# ruff: noqa: ARG002, N802  # names and shapes are the API's


MAX_LISTED_OBJECTIONS = 10  # objections in a message


class RuleServicer(rule_pb2_grpc.RuleServiceServicer):
    def __init__(self, store: RuleStore, base_rules: CompareOptions) -> None:
        """`rules`: what is set apart from what people declare."""
        self.store = store
        self.base_rules = base_rules

    async def CreateRule(self, request: pb.CreateRuleRequest, context: Any) -> pb.CreateRuleResponse:
        actor = rule_arguments.parse_actor(request, context.peer())
        rule, finding = await self._parse_rule(request)
        draft = rule_arguments.parse_draft(request.rule, rule)
        if not request.force:
            previews = await preview_rule(self.store.database, self.base_rules, rule)
            raise_if_overbroad(list_objections(previews, rule, finding))
        (rule_id,) = await self.store.replace_rules([draft], [], actor)
        return pb.CreateRuleResponse(rule=to_stored_rule_message(await self.store.get(rule_id)))

    async def ListRules(self, request: pb.ListRulesRequest, context: Any) -> pb.ListRulesResponse:
        page = arguments.parse_page(request)
        source = arguments.check_text("source", request.source) if request.HasField("source") else None
        finding_id = arguments.check_finding_id("finding_id", request.finding_id, minimum=0)
        filters = {"source": source, "finding_id": finding_id, "include_deleted": request.include_deleted}
        after_id = pages.decode_cursor("rules", filters, page.token)[0] if page.token else None
        rule_filter = RuleFilter(source, finding_id, include_ended=request.include_deleted)
        stored_rules = await self.store.list_rules(rule_filter, after_id=after_id, limit=page.size + 1)
        page_rules = stored_rules[: page.size]
        token = pages.encode_cursor("rules", filters, [page_rules[-1].id]) if len(stored_rules) > page.size else ""
        return pb.ListRulesResponse(
            rules=[to_stored_rule_message(stored_rule) for stored_rule in page_rules], next_page_token=token
        )

    async def DeleteRule(self, request: pb.DeleteRuleRequest, context: Any) -> pb.DeleteRuleResponse:
        actor = rule_arguments.parse_actor(request, context.peer())
        if request.id < 1:
            raise ArgumentError(f"id must be a rule's id from ListRules, got {request.id}")
        return pb.DeleteRuleResponse(rule=to_stored_rule_message(await self.store.delete(request.id, actor)))

    async def PreviewRule(self, request: pb.PreviewRuleRequest, context: Any) -> pb.PreviewRuleResponse:
        rule, finding = await self._parse_rule(request)
        previews = await preview_rule(self.store.database, self.base_rules, rule)
        return pb.PreviewRuleResponse(
            rule=rule_arguments.to_rule_message(rule),
            findings=[rule_arguments.to_hidden_finding_message(item) for item in previews],
            objections=list_objections(previews, rule, finding),
        )

    async def ApplyRules(self, request: pb.ApplyRulesRequest, context: Any) -> pb.ApplyRulesResponse:
        actor, source = (rule_arguments.parse_actor(request, context.peer()), rule_arguments.parse_source(request))
        drafts = rule_arguments.parse_drafts(request.rules, source)
        existing_rules = await self.store.list_rules(
            RuleFilter(source=source, include_expired=False), limit=MAX_ACTIVE_RULES + 1
        )
        unchanged_rules = [item for item in existing_rules if item.draft in drafts]
        deleted_rules = [item for item in existing_rules if item.draft not in drafts]
        unchanged_drafts = [item.draft for item in unchanged_rules]
        new_drafts = [draft for draft in drafts if draft not in unchanged_drafts]
        objection_texts = [] if request.force else await self._collect_objections(new_drafts)
        if request.dry_run:
            return _to_apply_response(
                [rule_arguments.to_draft_message(item) for item in new_drafts],
                deleted_rules,
                unchanged_rules,
                objection_texts,
            )
        raise_if_overbroad(objection_texts)
        rule_ids = await self.store.replace_rules(new_drafts, [item.id for item in deleted_rules], actor)
        created_rules = await self.store.list_rules(ids=rule_ids, limit=len(rule_ids)) if rule_ids else []
        return _to_apply_response(
            [to_stored_rule_message(item) for item in created_rules], deleted_rules, unchanged_rules, objection_texts
        )

    async def _collect_objections(self, drafts: Sequence[RuleDraft]) -> list[str]:
        objection_texts = []
        for draft in drafts:
            previews = await preview_rule(self.store.database, self.base_rules, draft.rule)
            objection_texts += [
                f"rule {draft.rule.name!r}: {objection}" for objection in list_objections(previews, draft.rule, None)
            ]
        return objection_texts

    async def _parse_rule(self, request: Any) -> tuple[Rule, FindingRef | None]:
        """The rule of a request, fitted to the finding that it is made for."""
        finding_id = arguments.check_finding_id("finding_id", request.finding_id, minimum=0)
        if not finding_id:
            return rule_arguments.parse_rule(request.rule), None
        if request.rule.action == pb.RULE_ACTION_WAIVE_COVERAGE:
            raise ArgumentError("finding_id must be left out: what waives coverage explains no finding")
        async with self.store.database.connection() as connection:
            finding = (await load_findings(connection, [finding_id])).get(finding_id)
        if finding is None:
            raise NotFoundError(
                f"the ledger holds no finding {finding_id} of single pairs; list them with ListFindings"
            )
        rule = rule_arguments.parse_narrowed_rule(request.rule, finding)
        if not (
            rule.applies_to(finding.service, finding.endpoint)
            and rule.may_match(finding.part, finding.path, finding.kind)
        ):
            raise ArgumentError(
                f"the rule does not cover finding {finding_id} ({finding.part} {finding.path} {finding.kind} of "
                f"{finding.endpoint}); leave out what limits it otherwise, or choose another action"
            )
        return rule, finding


def raise_if_overbroad(objection_texts: Sequence[str]) -> None:
    if objection_texts:
        suffix = (
            f"; and {len(objection_texts) - MAX_LISTED_OBJECTIONS} more"
            if len(objection_texts) > MAX_LISTED_OBJECTIONS
            else ""
        )
        raise OverbroadRuleError(
            f"the rule is broader than what it is made for: {'; '.join(objection_texts[:MAX_LISTED_OBJECTIONS])}{suffix}. "
            "Narrow it, or force it if all this is meant"
        )


def _to_apply_response(
    created_rules: Sequence[pb.Rule],
    deleted_rules: Sequence[StoredRule],
    unchanged_rules: Sequence[StoredRule],
    objection_texts: Sequence[str],
) -> pb.ApplyRulesResponse:
    return pb.ApplyRulesResponse(
        created=created_rules,
        deleted=[to_stored_rule_message(stored_rule) for stored_rule in deleted_rules],
        unchanged=[to_stored_rule_message(stored_rule) for stored_rule in unchanged_rules],
        objections=objection_texts,
    )
