"""Templates of endpoints: declare those of the settings, learn others from paths, and merge endpoints into them.

Each step is one transaction that changes the version of the rules, so that no worker writes under former templates. Then
every pair of an endpoint is where the templates put it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import orjson
import structlog
import yaml

from abreast_sidecar.compare.endpoints import (
    ID_SEGMENT,
    MAX_ROUTE_CHARS,
    EndpointTemplates,
    RouteSource,
    Template,
    TemplateError,
    learn_places,
    parse_template,
)
from abreast_sidecar.errors import OpenApiError, locate_error
from abreast_sidecar.settings import mask_passwords
from abreast_sidecar.store.catalogue import add_endpoints
from abreast_sidecar.store.counters import BET_MARKS
from abreast_sidecar.store.database import (
    AdvisoryLock,
    Connection,
    Row,
    exclusive,
    execute,
    fetch_row,
    fetch_rows,
    to_json,
)
from abreast_sidecar.store.records import EndpointKey
from abreast_sidecar.store.rules import read_templates

MAX_SERVICE_PLACES = 1000  # learned
MAX_MERGED_ENDPOINTS = 200  # in a transaction, while workers wait
MAX_MERGED_PAIRS = 50_000  # the same; one endpoint may have more
MAX_MERGE_STEPS = 100  # in one run
MERGE_TIMEOUT_S = 600  # for the statement that merges
DOCUMENT_TIMEOUT_S = 10.0
MAX_DOCUMENT_BYTES = 10 * 1024 * 1024
MAX_DOCUMENT_DEPTH = 100
MAX_DOCUMENT_PATHS = 5000
MAX_DOCUMENT_TEMPLATES = 20_000  # of all servers
MAX_DOCUMENT_SERVERS = 20
MAX_DOCUMENT_PROBLEMS = 10
MAX_PROBLEM_CHARS = 100  # of a path
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NO_BETS = 0x7FFF_FFFF & ~BET_MARKS

_SERVER_VARIABLE = re.compile(r"\{([^{}]+)\}")

log = structlog.get_logger(__name__)


async def learn_endpoints(connection: Connection, *, max_values: int, max_examples: int) -> None:
    """Learn places with more than `max_values` values (0: none), and merge endpoints whose route has changed."""
    if max_values:
        await _learn_places(connection, max_values)
    for _ in range(MAX_MERGE_STEPS):
        if not await _merge_endpoints(connection, max_examples):
            return


@exclusive(AdvisoryLock.REAPPLY, otherwise=None)
async def _learn_places(connection: Connection, max_values: int) -> None:
    pairs_by_service: dict[str, dict[str, int]] = {}
    for row in await fetch_rows(connection, "endpoints_from_paths"):
        if row["source"] in {"path", "learned"}:
            pairs = pairs_by_service.setdefault(row["service"], {})
            pairs[row["route"]] = pairs.get(row["route"], 0) + row["compared"]
    if all(len(pairs) <= max_values for pairs in pairs_by_service.values()):
        return
    templates = await read_templates(connection)
    added = [
        Template("learned", service, "", path)
        for service, pairs in pairs_by_service.items()
        for path in sorted(await asyncio.to_thread(_learn_service, templates, service, pairs, max_values))
    ]
    if added:
        await replace_templates(connection, added, [])
        places = [f"{template.service}: {template.path}" for template in added if template.path.endswith(ID_SEGMENT)]
        log.info("path segments with many values become ids", places=places)


def _learn_service(
    templates: EndpointTemplates, service: str, pairs: dict[str, int], max_values: int
) -> frozenset[str]:
    """Return the new places of a service and the values that they keep."""
    learned = templates.learned.get(service, frozenset())
    if len(learned) >= MAX_SERVICE_PLACES:
        return frozenset()
    return learn_places(pairs, learned, max_values) - learned


async def replace_templates(connection: Connection, added: Iterable[Template], removed: Iterable[Template]) -> None:
    """Add and remove templates, as a new version of the rules."""
    await fetch_row(connection, "rules_version_next")
    for name, templates in (("templates_add", added), ("templates_delete", removed)):
        await execute(connection, name, {"rows": to_json([template._asdict() for template in templates])})


@exclusive(AdvisoryLock.REAPPLY, otherwise=False)
async def _merge_endpoints(connection: Connection, max_examples: int) -> bool:
    """Merge some endpoints whose route is another one under the present templates. Return False without such endpoints."""
    templates = await read_templates(connection)
    rows = await fetch_rows(connection, "endpoints_from_paths")
    moves = await asyncio.to_thread(_list_moves, rows, templates)
    if not moves:
        return False
    await fetch_row(connection, "rules_version_next")
    targets = {(*target, source) for _, target, source in moves}
    await add_endpoints(connection, targets)
    rows = await fetch_rows(connection, "endpoints_read", {"services": list({target[0] for target in targets})})
    ids = {(row["service"], row["method"], row["route"]): row["id"] for row in rows}
    parameters = {
        "origins": [origin for origin, _, _ in moves],
        "targets": [ids[target] for _, target, _ in moves],
        "kept_marks": NO_BETS,
        "max_examples": max_examples,
    }
    await connection.execute(f"set local statement_timeout = '{MERGE_TIMEOUT_S}s'".encode())
    await execute(connection, "endpoints_merge", parameters)
    log.info("endpoints merged", endpoints=len(moves), into=len(targets))
    return True


def _list_moves(rows: Iterable[Row], templates: EndpointTemplates) -> list[tuple[int, EndpointKey, RouteSource]]:
    """Return the endpoints whose route is another one under the templates, with their targets and the source of these."""
    moves: list[tuple[int, EndpointKey, RouteSource]] = []
    pairs = 0
    for row in rows:
        route, source = templates.resolve(row["service"], row["method"], row["route"])
        if route == row["route"]:
            continue
        pairs += row["compared"]
        if moves and (len(moves) == MAX_MERGED_ENDPOINTS or pairs > MAX_MERGED_PAIRS):
            break
        moves.append((row["id"], (row["service"], row["method"], route), source))
    return moves


class ReadTemplates(NamedTuple):
    templates: set[Template]
    problems: list[str]  # one line for each error in a document
    is_complete: bool  # all documents could be read


class DeclaredTemplates:
    """The templates of the settings. A change of a document by its service is a change of them."""

    def __init__(self, configured: Sequence[str], documents: Sequence[str]) -> None:
        """`documents`: files or URLs."""
        self._configured = [Template("configured", "", *parse_template(text)) for text in configured]
        self._documents = documents
        self._stored: set[Template] | None = None
        self.problems: list[str] = []  # of the documents, as warnings

    async def read(self) -> ReadTemplates:
        """Return the templates of the settings and of the documents that can be read."""
        templates, problems, is_complete = set(self._configured), list[str](), True
        for document in self._documents:
            name = mask_passwords(document)
            try:
                paths, document_problems = await asyncio.to_thread(parse_openapi, await read_document(document))
            except OpenApiError as error:
                problems.append(f"{name}: {error}")
                is_complete = False
            except Exception as error:  # noqa: BLE001  # one document must not stop the others
                problems.append(f"{name}: it can't be used: {locate_error(error)}")
                is_complete = False
            else:
                problems += [f"{name}: {problem}" for problem in document_problems[:MAX_DOCUMENT_PROBLEMS]]
                if (more_count := len(document_problems) - MAX_DOCUMENT_PROBLEMS) > 0:
                    problems.append(f"{name}: it has {more_count} more problems")
                templates |= {Template("openapi", "", "", path) for path in paths}
        return ReadTemplates(templates, problems, is_complete)

    async def store(self, connection: Connection) -> None:
        """Store the templates if they have changed. While a document can't be read, its former templates stay."""
        templates, problems, is_complete = await self.read()
        if problems != self.problems:
            self.problems[:] = problems
            for problem in problems:
                log.warning("an OpenAPI document has an error", problem=problem)
        if templates == self._stored:
            return
        async with connection.transaction():
            rows = [Template(**row) for row in await fetch_rows(connection, "templates_read")]
            stored = {template for template in rows if template.source != "learned"}
            removable = stored if is_complete else {template for template in stored if template.source == "configured"}
            if added_or_removed := (templates - stored) | (removable - templates):
                await replace_templates(connection, templates - stored, removable - templates)
                log.info("templates of endpoints changed", templates=len(templates), changes=len(added_or_removed))
        self._stored = templates


async def read_document(document: str) -> str:
    """Read a file, or the answer of a URL. Raise OpenApiError."""
    try:
        if not document.startswith(("http://", "https://")):
            content = await asyncio.to_thread(_read_file, document)
        else:
            content = b""
            async with (
                httpx.AsyncClient(timeout=DOCUMENT_TIMEOUT_S, follow_redirects=True, trust_env=False) as client,
                asyncio.timeout(DOCUMENT_TIMEOUT_S),
                client.stream("GET", document, headers={"accept": "application/json, application/yaml"}) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    raise OpenApiError(f"its URL answers with status {response.status_code}")
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_DOCUMENT_BYTES:
                        break
    except TimeoutError:
        raise OpenApiError(f"its URL does not answer within {DOCUMENT_TIMEOUT_S:g} s") from None
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise OpenApiError(f"it can't be read: {error or type(error).__name__}") from error
    if len(content) > MAX_DOCUMENT_BYTES:
        raise OpenApiError(f"it has more than {MAX_DOCUMENT_BYTES} bytes")
    return content.decode("utf-8-sig", "replace")


def _read_file(name: str) -> bytes:
    with Path(name).open("rb") as file:
        return file.read(MAX_DOCUMENT_BYTES + 1)


@lru_cache(maxsize=8)  # most documents are the same as a minute ago
def parse_openapi(text: str) -> tuple[Sequence[str], Sequence[str]]:
    """Return the path templates of an OpenAPI document in JSON or YAML, and the problems of what is left out.

    Paths count with and without the path of `servers`, because a gateway may remove it. Raise OpenApiError without paths.
    """
    document = _load_document(text)
    if not isinstance(document, Mapping) or not {"openapi", "swagger"} & document.keys():
        raise OpenApiError("it has no field openapi or swagger, so it is no OpenAPI document")
    paths = document.get("paths")
    if not isinstance(paths, Mapping):
        raise OpenApiError(f"paths: must be a mapping, got {type(paths).__name__}")
    bases, problems = _list_base_paths(document)
    templates: list[str] = []
    names = [str(name) for name in paths if not str(name).startswith("x-")]
    max_paths = min(MAX_DOCUMENT_PATHS, MAX_DOCUMENT_TEMPLATES // len(bases))
    if len(names) > max_paths:
        problems.append(f"paths: it has more than {max_paths}; the others are left out")
    for path in names[:max_paths]:
        for base in bases:
            try:
                templates.append(parse_template(f"{base}{path}")[1])
            except TemplateError as error:
                problems.append(f"paths.{f'{base}{path}'[:MAX_PROBLEM_CHARS]}: {error}; the path is left out")
                if not base:
                    break
    return templates, problems


def _load_document(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:  # it may be YAML
        pass
    try:
        _check_structure(text)
        return yaml.load(text, Loader=YAML_LOADER)  # noqa: S506  # it is safe
    except yaml.YAMLError as error:
        place = _format_place(getattr(error, "problem_mark", None))
        raise OpenApiError(f"{place}{getattr(error, 'problem', None) or 'it is neither JSON nor YAML'}") from error
    except ValueError as error:  # for example of a date
        raise OpenApiError(f"it is neither JSON nor YAML: {error}") from error


def _check_structure(text: str) -> None:
    """Raise OpenApiError for deep nesting, which crashes the loader in C, and for merge keys, which can grow exponentially."""
    depth = 0
    for event in yaml.parse(text, Loader=YAML_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DOCUMENT_DEPTH:
            raise OpenApiError(f"{_format_place(event.start_mark)}it has more than {MAX_DOCUMENT_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
            raise OpenApiError(
                f"{_format_place(event.start_mark)}replace the merge key << by the keys that it stands for"
            )


def _format_place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _list_base_paths(document: Mapping[Any, Any]) -> tuple[list[str], list[str]]:
    """Return the empty path and the paths of `servers`, or `basePath` in version 2, and the problems of these."""
    bases, problems = [""], list[str]()
    servers = document.get("servers")
    servers = servers if isinstance(servers, list) else []
    if len(servers) > MAX_DOCUMENT_SERVERS:
        problems.append(f"servers: it has more than {MAX_DOCUMENT_SERVERS}; the others are left out")
    named_servers = [(f"servers.{number}", server) for number, server in enumerate(servers[:MAX_DOCUMENT_SERVERS])]
    for name, server in [("basePath", {"url": document.get("basePath")}), *named_servers]:
        if isinstance(server, Mapping):
            try:
                bases.append(_read_base_path(server))
            except ValueError as error:
                problems.append(f"{name}: {error}; paths count without it")
    return list(dict.fromkeys(bases)), problems


def _read_base_path(server: Mapping[Any, Any]) -> str:
    """Return the path of a server's URL, with the defaults of its variables. Raise ValueError for a bad URL."""
    url, variables = server.get("url"), server.get("variables")

    def read_default(match: re.Match[str]) -> str:
        variable = variables.get(match[1]) if isinstance(variables, Mapping) else None
        default = variable.get("default") if isinstance(variable, Mapping) else None
        return default[: MAX_ROUTE_CHARS + 1] if isinstance(default, str) else match[0]

    if not isinstance(url, str):
        return ""
    if len(url) <= MAX_ROUTE_CHARS:
        url = _SERVER_VARIABLE.sub(read_default, url)
    if len(url) > MAX_ROUTE_CHARS:
        raise ValueError(f"a URL has at most {MAX_ROUTE_CHARS} characters")
    base = urlsplit(url).path.rstrip("/")
    return parse_template(base)[1] if base.startswith("/") else ""
