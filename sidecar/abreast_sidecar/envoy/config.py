"""`abreast.yaml`: the settings of Envoy, of the sidecar and of services in one file, and its JSON schema.

The fields are the declared settings, so a field has the parser, the default and the documentation of its ABREAST_*
variable. Errors name the line and the field. Values of `envoy` and `sidecar` give way to variables and options, and values
of services do not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from abreast.settings import DeclaredSettings, Setting, share
from abreast_sidecar.envoy.settings import (
    ENVIRONMENT_PREFIX,
    ENVOY_WIDE_SETTINGS,
    SERVICE_NAME_PATTERN,
    EnvoySettings,
    list_conflicts,
    parse_edge_key,
)
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import Settings

CONFIG_FILE = "abreast.yaml"
VERSIONS = ("old", "new")
VARIABLE_PATTERN = re.compile(r"ABREAST_([A-Z0-9_]+)")
SHARE_SCHEMA = {"type": ["number", "string"], "minimum": 0, "maximum": 1, "pattern": r"^\d+(\.\d+)?\s*%?$"}

Fields = Mapping[str, Setting]
Values = dict[str, Any]  # text, or lists and mappings of text, by the name of the setting


def _declared(cls: type[DeclaredSettings]) -> dict[str, Setting]:
    """Return the settings that can be fields. A secret can only be the name of a variable: env:NAME."""
    return {part.name: part for part in cls.declared() if not part.secret or part.parse is parse_edge_key}


_ENVOY = _declared(EnvoySettings)
ENVOY_FIELDS: Fields = {name: part for name, part in _ENVOY.items() if name in ENVOY_WIDE_SETTINGS}
SIDECAR_FIELDS: Fields = {name: part for name, part in _declared(Settings).items() if name not in _ENVOY}
VERSION_FIELDS: Mapping[str, Fields] = {
    version: {
        "endpoints" if name == version else name.removeprefix(f"{version}_"): part
        for name, part in _ENVOY.items()
        if name == version or name.startswith(f"{version}_")
    }
    for version in VERSIONS
}
_VERSION_SETTINGS = {part.name for fields in VERSION_FIELDS.values() for part in fields.values()}
SERVICE_FIELDS: Fields = {
    name: part
    for name, part in _ENVOY.items()
    if name != "service" and name not in ENVOY_FIELDS and name not in _VERSION_SETTINGS
}


class ConfigProblem(NamedTuple):
    line: int
    message: str


class ConfigError(SettingError):
    """A file with problems. Each line of the message names the file and the line."""

    def __init__(self, name: str, problems: Sequence[ConfigProblem]) -> None:
        self.lines = [f"{name}:{line}: {message}" for line, message in sorted(problems)]
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True)
class Config:
    """The values of a file that are set. `services` is in the order of the file."""

    path: Path
    envoy: Values
    sidecar: Values
    services: Mapping[str, Values]

    def build_services(
        self, environment: Mapping[str, str] = os.environ, options: Mapping[str, Any] | None = None
    ) -> tuple[EnvoySettings, ...]:
        """Return the settings of each service. Raise SettingError.

        Variables and `options` override the settings of the whole Envoy. The settings of services are those of the file,
        so an option for one of them is an error.
        """
        given = {name: str(value) for name, value in (options or {}).items() if value not in {None, ()}}
        for name in given:
            if name not in ENVOY_WIDE_SETTINGS:
                raise SettingError(f"{_option(name)} and --config exclude each other: change {self.path}")
        envoy = _override(self.envoy, environment, ENVOY_WIDE_SETTINGS)
        envoy |= {f"ABREAST_{name.upper()}": value for name, value in given.items()}
        try:
            return tuple(
                EnvoySettings.from_environment({**envoy, **_to_variables(values), "ABREAST_SERVICE": name})
                for name, values in self.services.items()
            )
        except SettingError as error:
            names = {f"ABREAST_{name.upper()}": _option(name) for name in given}
            message = VARIABLE_PATTERN.sub(lambda match: names.get(match[0], match[0]), str(error))
            raise SettingError(message) from error

    def build_environment(self, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
        """Return the variables of the sidecar."""
        names = [part.name for part in Settings.declared()]
        return {**environment, **_override(self.sidecar, environment, names)}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _to_variables(values: Values) -> dict[str, Any]:
    return {f"ABREAST_{name.upper()}": value for name, value in values.items()}


def _override(values: Values, environment: Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
    """Return variables for the settings `names`: those of the environment, else the values of the file."""
    variables = _to_variables(values)
    for name in names:
        variable = f"ABREAST_{name.upper()}"
        for source in (f"{variable}_FILE", variable):
            if environment.get(source):
                variables.pop(variable, None)
                variables[source] = environment[source]
    return variables


def load_config(path: Path) -> Config:
    """Read and check a file. Raise SettingError: a ConfigError with all problems if the file can be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingError(f"{path} can't be read: {reason}") from error
    return parse_config(text, path)


def parse_config(text: str, path: Path = Path(CONFIG_FILE)) -> Config:
    """Check the text of a file. Raise ConfigError with all problems."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = ConfigProblem(
            mark.line + 1 if mark else 1, f"not valid YAML: {getattr(error, 'problem', None) or error}"
        )
        raise ConfigError(str(path), [problem]) from error
    reader = _Reader()
    config = reader.read(root, path)
    if reader.problems:
        raise ConfigError(str(path), reader.problems)
    return config


@dataclass
class _Reader:
    """Reads nodes of YAML, and collects all problems with their lines."""

    problems: list[ConfigProblem] = field(default_factory=list)

    def read(self, root: yaml.Node | None, path: Path) -> Config:
        if root is None:
            self.add(1, "the file is empty: it needs services, such as those in docs/config.md")
            return Config(path, {}, {}, {})
        sections = self.read_mapping(root, "the file", ("envoy", "sidecar", "services"))
        envoy, envoy_lines = self.read_fields(sections.get("envoy"), "envoy", ENVOY_FIELDS)
        sidecar, sidecar_lines = self.read_fields(sections.get("sidecar"), "sidecar", SIDECAR_FIELDS)
        self.build(EnvoySettings, envoy, "envoy", envoy_lines)
        self.build(Settings, sidecar, "sidecar", sidecar_lines)
        node = sections.get("services")
        services: dict[str, Values] = {}
        built: list[tuple[EnvoySettings, int]] = []
        if node is None or (isinstance(node, yaml.MappingNode) and not node.value):
            self.add(_line(root), "the file has no services: add `services:` with the name of a service below it")
        for name, (line, service_node) in self.read_entries(node, "services").items():
            services[name], lines = self.read_service(name, service_node)
            if not SERVICE_NAME_PATTERN.fullmatch(name):
                self.add(line, f"services.{name}: the name of a service must have 1 to 60 letters, digits, _ and -")
                continue
            settings = self.build(EnvoySettings, {**services[name], "service": name}, f"services.{name}", lines)
            built += [(settings, line)] if settings else []
        lines_by_service = {settings.service: line for settings, line in built}
        for names, request in list_conflicts([settings for settings, _line in built]):
            self.add(
                lines_by_service[names[1]],
                f"the services {names[0]} and {names[1]} both match {request}: give each separate hosts or prefixes",
            )
        return Config(path, envoy, sidecar, services)

    def read_service(self, name: str, node: yaml.Node) -> tuple[Values, dict[str, int]]:
        title = f"services.{name}"
        entries = self.read_mapping(node, title, (*VERSIONS, *SERVICE_FIELDS))
        values, lines = self.read_values(
            {key: entries[key] for key in entries if key in SERVICE_FIELDS}, title, SERVICE_FIELDS
        )
        for version in VERSIONS:
            if version not in entries:
                self.add(_line(node), f"{title} has no {version}: add `{version}:` with `endpoints:` below it")
                continue
            version_values, version_lines = self.read_fields(
                entries[version], f"{title}.{version}", VERSION_FIELDS[version]
            )
            if not _has_entry(entries[version], "endpoints"):
                self.add(
                    _line(entries[version]), f"{title}.{version} has no endpoints: add addresses such as 10.0.0.7:8000"
                )
            values |= version_values
            lines |= version_lines
        return values, lines

    def read_fields(self, node: yaml.Node | None, title: str, fields: Fields) -> tuple[Values, dict[str, int]]:
        if node is None:
            return {}, {}
        return self.read_values(self.read_mapping(node, title, tuple(fields)), title, fields)

    def read_values(
        self, entries: Mapping[str, yaml.Node], title: str, fields: Fields
    ) -> tuple[Values, dict[str, int]]:
        """Return the values that their parsers accept, and their lines, by the names of their settings."""
        values: Values = {}
        lines: dict[str, int] = {}
        for name, node in entries.items():
            declared = fields[name]
            try:
                value = _read_value(node, declared)
                if value == "":
                    continue
                declared.parse(value)
            except ValueError as error:
                shown = f", got {_describe(node)}" if not declared.secret else ""
                self.add(_line(node), f"{title}.{name} must be {error}{shown}")
                continue
            values[declared.name], lines[declared.name] = value, _line(node)
        return values, lines

    def build(self, cls: type[DeclaredSettings], values: Values, title: str, lines: Mapping[str, int]) -> Any:
        """Return the settings, or None if they contradict each other."""
        try:
            return cls.from_environment(_to_variables(values))
        except SettingError as error:
            message = str(error)
            names = [name.lower() for name in VARIABLE_PATTERN.findall(message)]
            line = next((lines[name] for name in names if name in lines), 1)
            self.add(line, VARIABLE_PATTERN.sub(lambda match: _name_field(title, match[1].lower()), message))
            return None

    def read_mapping(self, node: yaml.Node, title: str, names: Sequence[str]) -> dict[str, yaml.Node]:
        entries = {}
        for name, (line, value) in self.read_entries(node, title).items():
            if name in names:
                entries[name] = value
            else:
                self.add(line, f"{title} has no field {name!r}: use one of {', '.join(names)}")
        return entries

    def read_entries(self, node: yaml.Node | None, title: str) -> dict[str, tuple[int, yaml.Node]]:
        """Return the entries of a mapping, with the lines of their names."""
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.add(_line(node), f"{title} must be a mapping: write `name: value` lines, indented below it")
            return {}
        entries: dict[str, tuple[int, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.add(_line(key), f"{title} has a name that is not text")
            elif key.value in entries:
                self.add(
                    _line(key), f"{title}.{key.value} is there twice, first in line {entries[key.value][0]}: delete one"
                )
            else:
                entries[key.value] = (_line(key), value)
        return entries

    def add(self, line: int, message: str) -> None:
        problem = ConfigProblem(line, message)
        if problem not in self.problems:
            self.problems.append(problem)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _has_entry(node: yaml.Node, name: str) -> bool:
    return isinstance(node, yaml.MappingNode) and any(key.value == name for key, _value in node.value)


def _describe(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list or mapping"
    return repr(node.value) if node.value else "nothing"


def _read_value(node: yaml.Node, declared: Setting) -> Any:
    """Return a value as the parser of the setting expects it. Raise ValueError with the requirement.

    Text stays as the file has it, so that `1.10`, `on` and `12:30` mean the same as in a variable.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null":
            raise ValueError("a value: write one, or delete the field")
        if declared.secret and node.value and not node.value.startswith(ENVIRONMENT_PREFIX):
            raise ValueError(f"{ENVIRONMENT_PREFIX}NAME, so that the file contains no secret")
        return node.value
    if not isinstance(node, yaml.SequenceNode) or type(declared.default) is not tuple:
        raise ValueError("a single value" if type(declared.default) is not tuple else "a list")
    items = [_read_item(item) for item in node.value]
    if declared.repeatable:
        return items
    if all(isinstance(item, str) for item in items):
        if any("," in item for item in items):
            raise ValueError("a list of values without commas")
        return ",".join(items)
    return items


def _read_item(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, RecursionError, TypeError):
        raise ValueError("a list of values or of mappings") from None


def _name_field(title: str, name: str) -> str:
    """Return the place of a setting in the file."""
    for version, fields in VERSION_FIELDS.items():
        for field_name, declared in fields.items():
            if declared.name == name:
                return f"{title}.{version}.{field_name}"
    return f"envoy.{name}" if name in ENVOY_FIELDS else f"{title}.{name}"


def list_fields() -> Iterator[tuple[str, Setting]]:
    """Return all fields with their places, such as services.NAME.old.endpoints."""
    for section, fields in (("envoy", ENVOY_FIELDS), ("sidecar", SIDECAR_FIELDS), ("services.NAME", SERVICE_FIELDS)):
        yield from ((f"{section}.{name}", declared) for name, declared in fields.items())
    for version, fields in VERSION_FIELDS.items():
        yield from ((f"services.NAME.{version}.{name}", declared) for name, declared in fields.items())


def build_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, for editors. `parse_config` checks more."""
    service = _describe_section("A service with its two versions", SERVICE_FIELDS)
    for version, fields in VERSION_FIELDS.items():
        service["properties"][version] = {
            **_describe_section(f"The {version} version", fields),
            "required": ["endpoints"],
        }
    services = {
        "description": "Services by their names, as in the middleware",
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {**service, "required": list(VERSIONS)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of abreast",
        "type": "object",
        "additionalProperties": False,
        "required": ["services"],
        "properties": {
            "envoy": _describe_section("Settings of the whole Envoy", ENVOY_FIELDS),
            "sidecar": _describe_section("Settings of `abreast sidecar`", SIDECAR_FIELDS),
            "services": services,
        },
    }


def _describe_section(description: str, fields: Fields) -> dict[str, Any]:
    properties = {name: _describe_field(declared) for name, declared in fields.items()}
    return {"description": description, "type": "object", "additionalProperties": False, "properties": properties}


def _describe_field(declared: Setting) -> dict[str, Any]:
    default = declared.default
    if declared.parse is share:
        schema: dict[str, Any] = {**SHARE_SCHEMA, "default": default}
    elif isinstance(default, bool | int | float):
        name = "boolean" if isinstance(default, bool) else "integer" if isinstance(default, int) else "number"
        schema = {"type": name, "default": default}
    elif type(default) is tuple:
        schema = {
            "type": ["array", "string"],
            "items": {"type": ["string", "object"]},
            "default": list(map(str, default)),
        }
    else:
        schema = {"type": "string", **({"pattern": f"^{ENVIRONMENT_PREFIX}"} if declared.secret else {})}
        schema["default"] = declared.default_text
    return {"description": declared.doc, **schema}
