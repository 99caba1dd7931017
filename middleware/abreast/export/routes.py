"""The route template of a request, such as /products/{id}, which names its endpoint.

FastAPI, and Starlette from 1.0, leave the route in the scope as `route`. The templates of mounts are not in the scope,
and a middleware may have passed a copy of the scope to the app. In these cases, the resolver walks the routes as a
router does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_CACHED_TEMPLATES = 4096
MAX_PATH_CHARS = 1024  # longer paths are cut before the walk
MAX_NESTING_DEPTH = 50  # for middleware around a router, and for nested routers
REMAINING_PATH = "{path}"


class RouteResolver:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._prefixes: dict[str, str] = {}
        self._templates: dict[tuple[str, str], str] = {}

    def resolve(self, scope: Mapping[str, Any]) -> str:
        """Return the template, or an empty string if no route matches or the framework is unknown."""
        leaf = _find_leaf(scope)
        if leaf is None:
            return self._resolve_by_walking(scope)
        mount_path: str = (  # the part of the path that mounts matched
            scope.get("root_path", "").removeprefix(scope["app_root_path"]) if "app_root_path" in scope else ""
        )
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
    """Return the object with the path_format. For an included router of FastAPI, it is not the route."""
    route = scope.get("route")
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and route is getattr(context, "original_route", None) is not None:
        return context
    return route if isinstance(getattr(route, "path_format", None), str) else None


def _get_path(scope: Mapping[str, Any]) -> str:
    root = scope.get("app_root_path", scope.get("root_path", ""))
    path: str = scope["path"]
    path_in_app = path.removeprefix(root)
    return path_in_app if path_in_app.startswith("/") else path


def _get_inner_app(route: Any) -> Any:
    """Return the app of a mount or a host, or None."""
    return route.app if hasattr(route, "routes") and hasattr(route, "app") else None


def _get_routes(app: Any) -> list[Any]:
    """Return the routes of an app, below the middleware around it."""
    for _ in range(MAX_NESTING_DEPTH):
        routes = getattr(app, "routes", None)
        if isinstance(routes, list | tuple):
            return list(routes)
        app = getattr(app, "app", None)
        if app is None:
            break
    return []


def _expand_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """Yield the routes that can match. FastAPI keeps an included router as one route."""
    for route in routes:
        get_included = getattr(route, "effective_route_contexts", None)
        for candidate in get_included() if get_included is not None else (route,):
            yield getattr(candidate, "starlette_route", None) or candidate


def _enter(route: Any, path: str) -> tuple[str, str, str] | None:
    """Enter a mount or a host. Return None if it does not match.

    Return its template, the remaining path, and the template of that path if no inner route matches.
    """
    if hasattr(route, "host_regex"):  # a Host, which matches no part of the path
        return "", path, ""
    match = _match(route, path)
    if match is None:
        return None
    template: str = route.path_format.removesuffix(f"/{REMAINING_PATH}")
    return template, "/" + match.groupdict().get("path", ""), f"/{REMAINING_PATH}"


def _find_template(routes: list[Any], path: str, method: str, depth: int) -> str:
    """Return the first template that matches, or else the first that matches except for the method."""
    partial_match = ""
    for route in _expand_routes(routes):
        inner_app = _get_inner_app(route)
        if inner_app is not None and depth < MAX_NESTING_DEPTH:
            entry = _enter(route, path)
            if entry is not None:
                prefix, remaining, fallback = entry
                template = prefix + (_find_template(_get_routes(inner_app), remaining, method, depth + 1) or fallback)
                if template:
                    return template
        elif hasattr(route, "methods") and _match(route, path) is not None:
            if not route.methods or method in route.methods:
                return str(route.path_format)
            partial_match = partial_match or str(route.path_format)
    return partial_match


def _match(route: Any, path: str) -> re.Match[str] | None:
    pattern = getattr(route, "path_regex", None)
    return pattern.match(path) if isinstance(pattern, re.Pattern) else None


def _find_prefix(routes: list[Any], mount_path: str, depth: int) -> str | None:
    """Return the template of the nested mounts that together match `mount_path`."""
    if not mount_path:
        return ""
    for route in _expand_routes(routes):
        inner_app = _get_inner_app(route)
        entry = None if inner_app is None or depth >= MAX_NESTING_DEPTH else _enter(route, mount_path + "/")
        if entry is not None:
            inner_prefix = _find_prefix(_get_routes(inner_app), entry[1].removesuffix("/"), depth + 1)
            if inner_prefix is not None:
                return entry[0] + inner_prefix
    return None
