"""`abreast compare`: two files, by hand."""

from __future__ import annotations

import datetime as dt
import json
from urllib.parse import urlsplit

import click

from abreast.capture import Answer, Capture, Headers, Request, Version
from abreast_sidecar.cli import compare_files
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import counted, printable
from abreast_sidecar.compare import Difference, Judgement, Rules, judge
from abreast_sidecar.compare.rules_file import RuleError, load
from abreast_sidecar.errors import ArgumentError

LONGEST_VALUE = 160  # characters
COLOURS = {"breaking": "red", "value": "yellow", "additive": "cyan"}


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--http", "whole", is_flag=True, help="The files are HTTP responses, as curl -i prints them.")
@click.option(
    "--type",
    "kind",
    default=compare_files.JSON,
    show_default=True,
    help="Content type of the bodies; empty: guess.",
)
@click.option("--rules", "rules_file", help="A YAML file of rules.")
@click.option("--endpoint", default="GET /", help="For rules: what was asked, such as GET /products/{id}.")
@click.option("--url", default="", help="For redirects: the whole address that was asked.")
@click.option("--service", default="", help="For rules: the service's name.")
@click.option("--release", default="", help="For rules: the new version's release.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    old: str,
    new: str,
    whole: bool,
    kind: str,
    rules_file: str | None,
    endpoint: str,
    url: str,
    service: str,
    release: str,
    as_json: bool,
) -> int:
    """Compare two files: JSON bodies, or with --http whole responses. `-` is stdin.

    Exits with 0 where nothing differs that no rule explains, 1 where something does, 2 where they can't be compared.
    """
    if (old, new, rules_file).count(compare_files.STDIN) > 1:
        raise ArgumentError("only one of the files can be stdin")
    rules = _rules(rules_file)
    answers = [
        compare_files.http_answer(data, name) if whole else compare_files.body_answer(data, name, kind)
        for name, data in ((old, compare_files.read(old)), (new, compare_files.read(new)))
    ]
    request = _request(endpoint, url)
    captures = [
        _capture("old", request, answers[0], service, release),
        _capture("new", request, answers[1], service, release),
    ]
    judgement = judge(captures, rules)
    click.echo(as_text(judgement) if not as_json else json.dumps(as_record(judgement), indent=2))
    return code(judgement)


def code(judgement: Judgement) -> int:
    if judgement.differences:
        return Exit.NO
    return Exit.OK if judgement.outcome == "match" else Exit.USAGE


def _rules(name: str | None) -> Rules:
    if name is None:
        return Rules()
    try:
        text = compare_files.read(name).decode()
        return Rules(declared=load(text, name).on(dt.datetime.now(dt.UTC).date()))
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name} is not UTF-8: {error}") from error
    except RuleError as error:
        raise ArgumentError(str(error)) from error


def _request(endpoint: str, url: str) -> Request:
    method, _, route = endpoint.strip().partition(" ")
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise ArgumentError(
            f"--url must be an address such as https://shop.example/products/7, got {url!r}"
        ) from error
    headers: Headers = (("host", address.netloc),) if address.netloc else ()
    return Request(
        method=method.upper(), path=address.path or "/", route=route.strip() or "/", headers=headers
    )


def _capture(version: Version, request: Request, answer: Answer, service: str, release: str) -> Capture:
    return Capture(
        pair="",
        service=service,
        version=version,
        role="live",
        request=request,
        answer=answer,
        release=release,
    )


def as_record(judgement: Judgement) -> dict[str, object]:
    found: dict[str, object] = {"outcome": judgement.outcome}
    if judgement.reason:
        found["reason"] = judgement.reason
    found["differences"] = [_record(one) for one in (*judgement.differences, *judgement.explained)]
    return found


def _record(one: Difference) -> dict[str, str | None]:
    return {
        "part": one.part,
        "path": one.path,
        "place": one.place,
        "kind": one.kind,
        "old": one.old,
        "new": one.new,
        "impact": one.impact,
        "explained_by": one.explained_by or None,
        "hint": one.hint or None,
    }


def as_text(judgement: Judgement) -> str:
    lines = [line for one in judgement.differences for line in _lines(one)]
    lines += [line for one in judgement.explained for line in _lines(one)]
    return "\n".join([*lines, _summary(judgement)])


def _lines(one: Difference) -> list[str]:
    named = f"{one.part} {one.place or one.path}".strip()
    remark = f"explained by {one.explained_by}" if one.explained_by else one.impact
    colour = "bright_black" if one.explained_by else COLOURS[one.impact]
    lines = [f"{printable(named)}  {click.style(f'{one.kind}, {printable(remark)}', fg=colour)}"]
    lines += [
        f"  {sign} {printable(value, LONGEST_VALUE)}"
        for sign, value in (("-", one.old), ("+", one.new))
        if value
    ]
    if one.hint and not one.explained_by:
        lines.append(f"  a rule could say that it is {_advice(one)}")
    return lines


def _advice(one: Difference) -> str:
    return f"{printable(one.hint)}, for the path {printable(one.path)}"


def _summary(judgement: Judgement) -> str:
    reason = f" ({printable(judgement.reason)})" if judgement.reason else ""
    if not judgement.differences and judgement.outcome != "match":
        return f"not compared{reason}"
    explained = (
        f", {counted(len(judgement.explained), 'difference')} explained" if judgement.explained else ""
    )
    if not judgement.differences:
        return (
            f"nothing differs{explained}{reason}"
            if not explained
            else f"nothing unexplained differs{explained}{reason}"
        )
    return f"{counted(len(judgement.differences), 'difference')}{explained}{reason}"
