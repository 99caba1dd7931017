"""From settings to an envoy.yaml, and the real binary's word on it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import jinja2

from abreast_sidecar.embedded import envoy_binary
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import SidecarError

MILLION = 1_000_000
VALIDATE_TIMEOUT = 60.0  # seconds
LOG_PREFIX = re.compile(r"^(\[[^\]]*\])+ (\[[^\]]*\] )?")
PLAIN = re.compile(r"[ !#-\[\]-~]*")  # printable ASCII without quote and backslash


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
    environment.filters.update(text=_text, seconds=_seconds, fraction=_fraction, block=_block)
    return environment.get_template("envoy.yaml.j2").render(settings=settings).lstrip()


def validate(config: str) -> None:
    """Ask Envoy whether it would run this. Raise SidecarError with Envoy's complaint."""
    with tempfile.TemporaryDirectory(prefix="abreast-envoy-") as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(config)
        command = [
            str(envoy_binary()),
            "--mode",
            "validate",
            "--config-path",
            str(path),
            "--log-level",
            "error",
        ]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=VALIDATE_TIMEOUT
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SidecarError(f"envoy could not check the configuration: {error}") from error
    if done.returncode != 0:
        raise SidecarError(f"envoy refuses the configuration: {_complaint(done.stdout + done.stderr)}")


def _text(value: str) -> str:
    """A double-quoted YAML scalar that nothing in the value can leave."""
    if PLAIN.fullmatch(value):
        return f'"{value}"'
    return '"' + "".join(c if PLAIN.fullmatch(c) else f"\\U{ord(c):08x}" for c in value) + '"'


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "s"


def _fraction(share: float) -> str:
    """A share as Envoy's FractionalPercent; a bare number would be read as a percentage."""
    return f"{{numerator: {round(share * MILLION)}, denominator: MILLION}}"


def _block(text: str, width: int) -> str:
    """Lines that stand `width` columns in, the first of them after what is there already."""
    return text.strip().replace("\n", "\n" + " " * width)


def _complaint(output: str) -> str:
    """Envoy's own sentence, without the prefixes of its log and the name of our temporary file."""
    lines = [" ".join(LOG_PREFIX.sub("", text).split()) for text in output.splitlines() if text.strip()]
    wanted = [text for text in lines if text.startswith("error initializing configuration")]
    return re.sub(
        r"^error initializing configuration '[^']*': ", "", (wanted or lines or ["no reason given"])[-1]
    )
