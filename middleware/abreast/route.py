"""The template of a request's path, such as /products/{id}: what endpoints are told apart by.

Routers leave their choice in the scope: FastAPI and Starlette from 1.0 as `route`, earlier Starlette not at all. The
template of the mounts above it is not there, nor is the choice when some middleware gave the app a copy of the scope;
both are found by walking the routes as the router did. Runs in the background.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MOST_CACHED = 4096
MOST_LENGTH = 1024  # of a path that is walked
MOST_DEPTH = 50  # of middleware around a router, and of routers within each other
REST = "{path}"


class Routes:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._prefixes: dict[str, str] = {}
        self._templates: dict[tuple[str, str], str] = {}

    def template(self, scope: Mapping[str, Any]) -> str:
        """Empty when the framework has no routes that are known, or none that fits."""
        leaf = _leaf(scope)
        if leaf is None:
            return self._walked(scope)
        mounted = _mounted(scope)
        own = f"/{REST}" if _inner(leaf) is not None else leaf.path_format
        return self._prefix(scope, mounted) + own if mounted else own

    def _prefix(self, scope: Mapping[str, Any], mounted: str) -> str:
        if mounted not in self._prefixes:
            _make_room(self._prefixes)
            found = _prefix(_routes(scope.get("router") or self._app), mounted, 0)
            self._prefixes[mounted] = mounted if found is None else found
        return self._prefixes[mounted]

    def _walked(self, scope: Mapping[str, Any]) -> str:
        key = (scope["method"], _path(scope)[:MOST_LENGTH])
        if key not in self._templates:
            _make_room(self._templates)
            self._templates[key] = _find(_routes(scope.get("router") or self._app), key[1], key[0], 0)
        return self._templates[key]


def _make_room(cache: dict[Any, str]) -> None:
    if len(cache) >= MOST_CACHED:
        cache.clear()


def _leaf(scope: Mapping[str, Any]) -> Any:
    """What knows the path_format; where FastAPI included a router, that is not the route itself."""
    route = scope.get("route")
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and route is getattr(context, "original_route", None) is not None:
        return context
    return route if isinstance(getattr(route, "path_format", None), str) else None


def _mounted(scope: Mapping[str, Any]) -> str:
    """The part of the path that mounts took, as it was sent."""
    if "app_root_path" not in scope:
        return ""
    mounted: str = scope.get("root_path", "").removeprefix(scope["app_root_path"])
    return mounted


def _path(scope: Mapping[str, Any]) -> str:
    root = scope.get("app_root_path", scope.get("root_path", ""))
    path: str = scope["path"]
    rest = path.removeprefix(root)
    return rest if rest.startswith("/") else path


def _inner(route: Any) -> Any:
    """The app of a mount or a host."""
    return route.app if hasattr(route, "routes") and hasattr(route, "app") else None


def _routes(app: Any) -> list[Any]:
    """The routes of an app, looked for below the middleware around it."""
    for _ in range(MOST_DEPTH):
        routes = getattr(app, "routes", None)
        if isinstance(routes, list | tuple):
            return list(routes)
        app = getattr(app, "app", None)
        if app is None:
            break
    return []


def _expanded(routes: Iterable[Any]) -> Iterator[Any]:
    """FastAPI keeps an included router as one route; what it holds is what can be matched."""
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)
        for candidate in included() if included is not None else (route,):
            yield getattr(candidate, "starlette_route", None) or candidate


def _matched(route: Any, path: str) -> tuple[str, str] | None:
    """What a mount takes of the path, and what it leaves."""
    pattern = getattr(route, "path_regex", None)
    match = pattern.match(path) if isinstance(pattern, re.Pattern) else None
    if match is None:
        return None
    rest = "/" + match.groupdict().get("path", "")
    return path[: len(path) - len(rest)], rest


def _find(routes: list[Any], path: str, method: str, depth: int) -> str:
    """The first route that fits, or else the first that fits but for the method, as routers do it."""
    partial = ""
    for route in _expanded(routes):
        inner = _inner(route)
        if inner is not None and depth < MOST_DEPTH:
            found = _within(route, inner, path, method, depth + 1)
            if found:
                return found
        elif _fits(route, path):
            if not route.methods or method in route.methods:
                return str(route.path_format)
            partial = partial or str(route.path_format)
    return partial


def _fits(route: Any, path: str) -> bool:
    pattern = getattr(route, "path_regex", None)
    return isinstance(pattern, re.Pattern) and hasattr(route, "methods") and pattern.match(path) is not None


def _within(route: Any, inner: Any, path: str, method: str, depth: int) -> str:
    if hasattr(route, "host_regex"):  # a Host: it takes nothing of the path
        return _find(_routes(inner), path, method, depth)
    taken = _matched(route, path)
    if taken is None:
        return ""
    own: str = route.path_format.removesuffix(f"/{REST}")
    return own + (_find(_routes(inner), taken[1], method, depth) or f"/{REST}")


def _prefix(routes: list[Any], mounted: str, depth: int) -> str | None:
    """The template of the nested mounts that together took `mounted`."""
    if not mounted:
        return ""
    for route in _expanded(routes):
        inner = _inner(route)
        if inner is None or depth >= MOST_DEPTH:
            continue
        own, rest = "", mounted
        if not hasattr(route, "host_regex"):
            taken = _matched(route, mounted + "/")
            if taken is None:
                continue
            own, rest = route.path_format.removesuffix(f"/{REST}"), taken[1].removesuffix("/")
        found = _prefix(_routes(inner), rest, depth + 1)
        if found is not None:
            return own + found
    return None
