#!/bin/sh
# Runs the tests that depend on the kind of server again, on Redis 7 and Postgres 15 where they are installed, and those
# of a pooler before Postgres and of clocks that jump.
# tests/other_servers.sh BIN JOBS
set -eu
redis=/usr/bin/redis-server
postgres=/usr/lib/postgresql/15/bin

if [ -x "$redis" ] && "$redis" --version | grep -q 'v=7'; then
    echo "again on $($redis --version | cut -d' ' -f1-3):"
    ABREAST_TEST_REDIS=$redis "$1/pytest" -q -n "$2" -m redis
fi
if [ -x "$postgres/initdb" ]; then
    echo "again on $("$postgres/postgres" --version):"
    ABREAST_TEST_POSTGRES=$postgres "$1/pytest" -q -n "$2" -m postgres
fi
if PATH=$PATH:/usr/sbin command -v pgbouncer >/dev/null; then
    echo "through $(PATH=$PATH:/usr/sbin pgbouncer --version | head -n 1):"
    "$1/pytest" -q -n "$2" -m pooler
else
    echo "not run: the tests of a pooler before Postgres, for which pgbouncer must be installed"
fi
if ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1; then
    echo "with clocks that jump:"
    "$1/pytest" -q -n "$2" -m clocks
else
    echo "not run: the tests of clocks that jump, for which libfaketime must be installed"
fi
