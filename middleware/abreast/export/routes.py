"""The template of a request's path, such as /products/{id}: what endpoints are told apart by.

Routers leave their choice in the scope: FastAPI and Starlette from 1.0 as `route`, earlier Starlette not at all. The
template of the mounts above it is not there, nor is the choice when some middleware gave the app a copy of the scope;
both are found by walking the routes as the router did. Runs in the background.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_CACHED_TEMPLATES = 4096
MAX_PATH_CHARS = 1024  # of a path that is walked
MAX_NESTING_DEPTH = 50  # of middleware around a router, and of routers within each other
REMAINING_PATH = "{path}"


class RouteResolver:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._prefixes: dict[str, str] = {}
        self._templates: dict[tuple[str, str], str] = {}

    def resolve(self, scope: Mapping[str, Any]) -> str:
        """Empty when the framework has no routes that are known, or none that fits."""
        leaf = _find_leaf(scope)
        if leaf is None:
            return self._resolve_by_walking(scope)
        mount_path = _get_mount_path(scope)
        template = f"/{REMAINING_PATH}" if _get_inner_app(leaf) is not None else leaf.path_format
        return self._resolve_prefix(scope, mount_path) + template if mount_path else template

    def _resolve_prefix(self, scope: Mapping[str, Any], mount_path: str) -> str:
        if mount_path not in self._prefixes:
            _clear_if_full(self._prefixes)
            prefix = _find_prefix(_get_routes(scope.get("router") or self._app), mount_path, 0)
            self._prefixes[mount_path] = mount_path if prefix is None else prefix
        return self._prefixes[mount_path]

    def _resolve_by_walking(self, scope: Mapping[str, Any]) -> str:
        key = (scope["method"], _get_path(scope)[:MAX_PATH_CHARS])
        if key not in self._templates:
            _clear_if_full(self._templates)
            self._templates[key] = _find_template(_get_routes(scope.get("router") or self._app), key[1], key[0], 0)
        return self._templates[key]


def _clear_if_full(cache: dict[Any, str]) -> None:
    if len(cache) >= MAX_CACHED_TEMPLATES:
        cache.clear()


def _find_leaf(scope: Mapping[str, Any]) -> Any:
    """What knows the path_format; where FastAPI included a router, that is not the route itself."""
    route = scope.get("route")
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and route is getattr(context, "original_route", None) is not None:
        return context
    return route if isinstance(getattr(route, "path_format", None), str) else None


def _get_mount_path(scope: Mapping[str, Any]) -> str:
    """The part of the path that mounts took, as it was sent."""
    if "app_root_path" not in scope:
        return ""
    mount_path: str = scope.get("root_path", "").removeprefix(scope["app_root_path"])
    return mount_path


def _get_path(scope: Mapping[str, Any]) -> str:
    root = scope.get("app_root_path", scope.get("root_path", ""))
    path: str = scope["path"]
    path_in_app = path.removeprefix(root)
    return path_in_app if path_in_app.startswith("/") else path


def _get_inner_app(route: Any) -> Any:
    """The app of a mount or a host."""
    return route.app if hasattr(route, "routes") and hasattr(route, "app") else None


def _get_routes(app: Any) -> list[Any]:
    """The routes of an app, looked for below the middleware around it."""
    for _ in range(MAX_NESTING_DEPTH):
        routes = getattr(app, "routes", None)
        if isinstance(routes, list | tuple):
            return list(routes)
        app = getattr(app, "app", None)
        if app is None:
            break
    return []


def _expand_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """FastAPI keeps an included router as one route; what it holds is what can be matched."""
    for route in routes:
        get_included = getattr(route, "effective_route_contexts", None)
        for candidate in get_included() if get_included is not None else (route,):
            yield getattr(candidate, "starlette_route", None) or candidate


def _match_mount(route: Any, path: str) -> tuple[str, str] | None:
    """What a mount takes of the path, and what it leaves."""
    pattern = getattr(route, "path_regex", None)
    match = pattern.match(path) if isinstance(pattern, re.Pattern) else None
    if match is None:
        return None
    remaining = "/" + match.groupdict().get("path", "")
    return path[: len(path) - len(remaining)], remaining


def _find_template(routes: list[Any], path: str, method: str, depth: int) -> str:
    """The first route that fits, or else the first that fits but for the method, as routers do it."""
    partial_match = ""
    for route in _expand_routes(routes):
        inner_app = _get_inner_app(route)
        if inner_app is not None and depth < MAX_NESTING_DEPTH:
            template = _find_within(route, inner_app, path, method, depth + 1)
            if template:
                return template
        elif _is_match(route, path):
            if not route.methods or method in route.methods:
                return str(route.path_format)
            partial_match = partial_match or str(route.path_format)
    return partial_match


def _is_match(route: Any, path: str) -> bool:
    pattern = getattr(route, "path_regex", None)
    return isinstance(pattern, re.Pattern) and hasattr(route, "methods") and pattern.match(path) is not None


def _find_within(route: Any, inner_app: Any, path: str, method: str, depth: int) -> str:
    if hasattr(route, "host_regex"):  # a Host: it takes nothing of the path
        return _find_template(_get_routes(inner_app), path, method, depth)
    mount_match = _match_mount(route, path)
    if mount_match is None:
        return ""
    template: str = route.path_format.removesuffix(f"/{REMAINING_PATH}")
    return template + (_find_template(_get_routes(inner_app), mount_match[1], method, depth) or f"/{REMAINING_PATH}")


def _find_prefix(routes: list[Any], mount_path: str, depth: int) -> str | None:
    """The template of the nested mounts that together took `mounted`."""
    if not mount_path:
        return ""
    for route in _expand_routes(routes):
        inner_app = _get_inner_app(route)
        if inner_app is None or depth >= MAX_NESTING_DEPTH:
            continue
        template, remaining = "", mount_path
        if not hasattr(route, "host_regex"):
            mount_match = _match_mount(route, mount_path + "/")
            if mount_match is None:
                continue
            template, remaining = (
                route.path_format.removesuffix(f"/{REMAINING_PATH}"),
                mount_match[1].removesuffix("/"),
            )
        inner_prefix = _find_prefix(_get_routes(inner_app), remaining, depth + 1)
        if inner_prefix is not None:
            return template + inner_prefix
    return None
