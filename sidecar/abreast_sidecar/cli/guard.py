"""`abreast guard`: goes back by itself."""

from __future__ import annotations

import datetime as dt

import click
from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from abreast.v1 import steering_pb2 as api
from abreast_sidecar.cli.connection import Link, connected, json_option, print_json, service_option
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import ago, count, duration, percent, printable
from abreast_sidecar.cli.parameters import EXCESS, SHARE, SPAN_OF_TIME
from abreast_sidecar.cli.shift import actor_option, actor_or_user, reason_option
from abreast_sidecar.cli.tables import Console, console, styled, table

RULES = ("errors", "mismatches", "slower")
STYLES = {"CLEAR": "ok", "BREACHED": "fail", "BLIND": "warn", "WAITING": "warn"}


@click.group(invoke_without_command=True)
@service_option
@json_option
@connected
@click.pass_context
def command(ctx: click.Context, link: Link, service: str, as_json: bool) -> None:
    """When users are sent back to old without being asked, and what the guard sees; `set` changes it."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetGuardRequest(service=service)
    found = link.run(lambda calls: calls.steering.GetGuard(request, timeout=calls.timeout))
    tell(found.guard, found, as_json=as_json)


@command.command("set")
@click.option(
    "--mode", type=click.Choice(["off", "watching", "acting"]), help="Watching only records what it would do."
)
@click.option("--max-error", type=SHARE, help="Share of users' requests in which only new may fail; 0.1%.")
@click.option("--max-mismatch", type=SHARE, help="Share of pairs that may have unexplained mismatches; 1%.")
@click.option("--max-slower", type=EXCESS, help="How much slower new may be in the median pair; 100%.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(RULES),
    help="What the next three are for; all rules unless said. May be repeated.",
)
@click.option("--min-pairs", type=click.IntRange(min=1), help="Pairs in the window, before it says anything.")
@click.option("--window", type=SPAN_OF_TIME, help="How far back it looks, such as 10m.")
@click.option("--cooldown", type=SPAN_OF_TIME, help="How long a rule rests after it acted, such as 5m.")
@click.option(
    "--min-completeness", type=SHARE, help="Share of the sampled requests below which it is blind; 90%."
)
@click.option("--confidence", type=SHARE, help="How sure to be; 99%.")
@reason_option
@actor_option
@service_option
@json_option
@connected
def set_(
    link: Link,
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
        made = _rule(values[option], rule in (rules or RULES), values)
        if made.ByteSize() or made.HasField("limit"):
            getattr(policy, rule).CopyFrom(made)
    if not policy.ByteSize():
        raise click.UsageError("say what to set, such as --mode acting")
    request = api.SetGuardRequest(service=service, policy=policy, actor=actor_or_user(actor), reason=reason)
    found = link.run(lambda calls: calls.steering.SetGuard(request, timeout=calls.timeout))
    tell(found.guard, found, as_json=as_json)
    return Exit.OK


def _rule(limit: float | None, chosen: bool, values: dict[str, float | None]) -> api.GuardRule:
    made = api.GuardRule()
    if limit is not None:
        made.limit = limit
    if not chosen:
        return made
    if (pairs := values["min_pairs"]) is not None:
        made.min_pairs = int(pairs)
    for name in ("window", "cooldown"):
        if (span := values[name]) is not None:
            getattr(made, name).CopyFrom(Duration(seconds=int(span), nanos=round(span % 1 * 1e9)))
    return made


def tell(guard: api.Guard, found: api.GetGuardResponse | api.SetGuardResponse, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        show(console(), guard, dt.datetime.now(dt.UTC))


def show(out: Console, guard: api.Guard, now: dt.datetime) -> None:
    out.print(guard_line(guard, now))
    made = table("rule", "limit", "min pairs", "window", "cool-down", right=frozenset({"limit", "min pairs"}))
    for rule in RULES:
        said: api.GuardRule = getattr(guard.policy, rule)
        made.add_row(
            rule, percent(said.limit), count(said.min_pairs), duration(said.window), duration(said.cooldown)
        )
    out.print(made)
    sure, whole = percent(guard.policy.confidence), percent(guard.policy.min_completeness)
    out.print(f"confidence {sure}; blind below {whole} of the sampled requests", style="dim")


def guard_changes(before: api.GuardPolicy, after: api.GuardPolicy) -> list[str]:
    """`guard mode off → acting`, one a line."""
    were, are = _told(before), _told(after)
    return [f"guard {name} {were[name]} → {are[name]}" for name in are if were[name] != are[name]]


def _told(policy: api.GuardPolicy) -> dict[str, str]:
    told = {"mode": _mode(policy)}
    for rule in RULES:
        said: api.GuardRule = getattr(policy, rule)
        told |= {
            f"{rule} limit": percent(said.limit),
            f"{rule} min pairs": count(said.min_pairs),
            f"{rule} window": duration(said.window),
            f"{rule} cool-down": duration(said.cooldown),
        }
    blind, sure = percent(policy.min_completeness), percent(policy.confidence)
    return told | {"completeness": blind, "confidence": sure}


def _mode(policy: api.GuardPolicy) -> str:
    return api.GuardMode.Name(policy.mode).removeprefix("GUARD_MODE_").lower()


def guard_line(guard: api.Guard, now: dt.datetime) -> Text:
    mode = _mode(guard.policy)
    state = api.GuardState.Name(guard.state).removeprefix("GUARD_STATE_")
    if mode == "off":
        return styled("guard: off")
    seen = f" ({ago(guard.look_time, now)})" if guard.HasField("look_time") else ""
    line = styled(f"guard: {mode}, ")
    line.append_text(styled(state.lower(), STYLES.get(state, "")))
    line.append(f"{seen}" + (f": {printable(guard.said)}" if guard.said else ""))
    return line
