"""PgBouncer in transaction mode before a Postgres of the tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg

from abreast_sidecar.stack.process import (
    ServerProcess,
    chown_to_server_user,
    create_private_folder,
    get_unprivileged_identity,
    remove_folder,
)
from support import free_ports

CONFIG = """[databases]
* = host=127.0.0.1 port={upstream}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = 4
max_client_conn = 100
"""


def pgbouncer() -> str | None:
    return shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")


@contextmanager
def pooled(url: str) -> Iterator[str]:
    """Return the URL of the database through the pooler, which gives each transaction another session."""
    program = pgbouncer()
    assert program, "pgbouncer is needed: apt-get install pgbouncer"
    place = urlsplit(url)
    (port,) = free_ports(1)
    folder = create_private_folder("abreast-pooler-")
    (folder / "users.txt").write_text(f'"{place.username}" "{place.password}"\n')
    (folder / "pgbouncer.ini").write_text(CONFIG.format(upstream=place.port, port=port, folder=folder))
    chown_to_server_user(folder / "users.txt")
    chown_to_server_user(folder / "pgbouncer.ini")
    pooler_url = place._replace(netloc=f"{place.username}:{place.password}@127.0.0.1:{port}").geturl()
    server = ServerProcess.start(
        "pgbouncer",
        [program, folder / "pgbouncer.ini"],
        folder / "pgbouncer.log",
        is_ready=lambda _: _answers(pooler_url),
        identity=get_unprivileged_identity(),
    )
    try:
        yield pooler_url
    finally:
        server.stop()
        remove_folder(folder)


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=1, prepare_threshold=None) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False
