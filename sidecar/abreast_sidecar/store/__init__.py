"""The ledger in Postgres."""

from abreast_sidecar.store.judged import Judged
from abreast_sidecar.store.ledger import Ledger
from abreast_sidecar.store.migrate import migrate

__all__ = ["Judged", "Ledger", "migrate"]
