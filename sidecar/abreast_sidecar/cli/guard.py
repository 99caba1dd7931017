"""`abreast guard`: goes back by itself."""

from __future__ import annotations

import datetime as dt

import click
from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from abreast.v1 import steering_pb2 as api
from abreast_sidecar.cli.connection import (
    SidecarClient,
    connection_options,
    json_option,
    print_json,
    service_option,
)
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.humane import format_age, format_count, format_duration, format_percent, to_printable
from abreast_sidecar.cli.parameters import EXCESS_TYPE, SHARE_TYPE, SPAN_TYPE
from abreast_sidecar.cli.shift import actor_option, default_actor, reason_option
from abreast_sidecar.cli.tables import Console, make_console, make_table, style_text

GUARD_RULES = ("errors", "mismatches", "slower")
GUARD_STATE_STYLES = {"CLEAR": "ok", "BREACHED": "fail", "BLIND": "warn", "WAITING": "warn"}


@click.group(invoke_without_command=True)
@service_option
@json_option
@connection_options
@click.pass_context
def guard_command(ctx: click.Context, link: SidecarClient, service: str, as_json: bool) -> None:
    """When users are sent back to old without being asked, and what the guard sees; `set` changes it."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetGuardRequest(service=service)
    response = link.call(lambda calls: calls.steering.GetGuard(request, timeout=calls.timeout_s))
    print_guard_response(response.guard, response, as_json=as_json)


@guard_command.command("set")
@click.option(
    "--mode", type=click.Choice(["off", "watching", "acting"]), help="Watching only records what it would do."
)
@click.option(
    "--max-error", type=SHARE_TYPE, help="Share of users' requests in which only new may fail; 0.1%."
)
@click.option(
    "--max-mismatch", type=SHARE_TYPE, help="Share of pairs that may have unexplained mismatches; 1%."
)
@click.option("--max-slower", type=EXCESS_TYPE, help="How much slower new may be in the median pair; 100%.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(GUARD_RULES),
    help="What the next three are for; all rules unless said. May be repeated.",
)
@click.option("--min-pairs", type=click.IntRange(min=1), help="Pairs in the window, before it says anything.")
@click.option("--window", type=SPAN_TYPE, help="How far back it looks, such as 10m.")
@click.option("--cooldown", type=SPAN_TYPE, help="How long a rule rests after it acted, such as 5m.")
@click.option(
    "--min-completeness", type=SHARE_TYPE, help="Share of the sampled requests below which it is blind; 90%."
)
@click.option("--confidence", type=SHARE_TYPE, help="How sure to be; 99%.")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def set_guard(
    link: SidecarClient,
    service: str,
    mode: str | None,
    rules: tuple[str, ...],
    reason: str,
    actor: str | None,
    as_json: bool,
    **values: float | None,
) -> int:
    """Change what is named; the rest stays. What was seen before no longer counts."""
    policy = api.GuardPolicy()
    if mode:
        policy.mode = api.GuardMode.Value(f"GUARD_MODE_{mode.upper()}")
    for name in ("min_completeness", "confidence"):
        if (value := values[name]) is not None:
            setattr(policy, name, value)
    limits = {"errors": "max_error", "mismatches": "max_mismatch", "slower": "max_slower"}
    for rule, option in limits.items():
        guard_rule = _build_guard_rule(values[option], rule in (rules or GUARD_RULES), values)
        if guard_rule.ByteSize() or guard_rule.HasField("limit"):
            getattr(policy, rule).CopyFrom(guard_rule)
    if not policy.ByteSize():
        raise click.UsageError("say what to set, such as --mode acting")
    request = api.SetGuardRequest(service=service, policy=policy, actor=default_actor(actor), reason=reason)
    response = link.call(lambda calls: calls.steering.SetGuard(request, timeout=calls.timeout_s))
    print_guard_response(response.guard, response, as_json=as_json)
    return ExitCode.OK


def _build_guard_rule(
    limit: float | None, is_selected: bool, values: dict[str, float | None]
) -> api.GuardRule:
    guard_rule = api.GuardRule()
    if limit is not None:
        guard_rule.limit = limit
    if not is_selected:
        return guard_rule
    if (pairs := values["min_pairs"]) is not None:
        guard_rule.min_pairs = int(pairs)
    for name in ("window", "cooldown"):
        if (seconds := values[name]) is not None:
            getattr(guard_rule, name).CopyFrom(Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9)))
    return guard_rule


def print_guard_response(
    guard: api.Guard, response: api.GetGuardResponse | api.SetGuardResponse, *, as_json: bool
) -> None:
    if as_json:
        print_json(response)
    else:
        print_guard(make_console(), guard, dt.datetime.now(dt.UTC))


def print_guard(out: Console, guard: api.Guard, current_time: dt.datetime) -> None:
    out.print(format_guard_line(guard, current_time))
    table = make_table(
        "rule", "limit", "min pairs", "window", "cool-down", numeric_columns=frozenset({"limit", "min pairs"})
    )
    for rule in GUARD_RULES:
        guard_rule: api.GuardRule = getattr(guard.policy, rule)
        table.add_row(
            rule,
            format_percent(guard_rule.limit),
            format_count(guard_rule.min_pairs),
            format_duration(guard_rule.window),
            format_duration(guard_rule.cooldown),
        )
    out.print(table)
    confidence, min_completeness = (
        format_percent(guard.policy.confidence),
        format_percent(guard.policy.min_completeness),
    )
    out.print(f"confidence {confidence}; blind below {min_completeness} of the sampled requests", style="dim")


def format_guard_changes(before: api.GuardPolicy, after: api.GuardPolicy) -> list[str]:
    """`guard mode off → acting`, one a line."""
    values_before, values_after = _format_policy_values(before), _format_policy_values(after)
    return [
        f"guard {name} {values_before[name]} → {values_after[name]}"
        for name in values_after
        if values_before[name] != values_after[name]
    ]


def _format_policy_values(policy: api.GuardPolicy) -> dict[str, str]:
    values = {"mode": _format_guard_mode(policy)}
    for rule in GUARD_RULES:
        guard_rule: api.GuardRule = getattr(policy, rule)
        values |= {
            f"{rule} limit": format_percent(guard_rule.limit),
            f"{rule} min pairs": format_count(guard_rule.min_pairs),
            f"{rule} window": format_duration(guard_rule.window),
            f"{rule} cool-down": format_duration(guard_rule.cooldown),
        }
    min_completeness, confidence = format_percent(policy.min_completeness), format_percent(policy.confidence)
    return values | {"completeness": min_completeness, "confidence": confidence}


def _format_guard_mode(policy: api.GuardPolicy) -> str:
    return api.GuardMode.Name(policy.mode).removeprefix("GUARD_MODE_").lower()


def format_guard_line(guard: api.Guard, current_time: dt.datetime) -> Text:
    mode = _format_guard_mode(guard.policy)
    state = api.GuardState.Name(guard.state).removeprefix("GUARD_STATE_")
    if mode == "off":
        return style_text("guard: off")
    age_text = f" ({format_age(guard.look_time, current_time)})" if guard.HasField("look_time") else ""
    line = style_text(f"guard: {mode}, ")
    line.append_text(style_text(state.lower(), GUARD_STATE_STYLES.get(state, "")))
    line.append(f"{age_text}" + (f": {to_printable(guard.said)}" if guard.said else ""))
    return line
