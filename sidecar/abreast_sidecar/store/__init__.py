"""The ledger in Postgres."""

from abreast_sidecar.store.judged import PairRecord
from abreast_sidecar.store.ledger import PairWriter
from abreast_sidecar.store.migrate import migrate

__all__ = ["PairRecord", "PairWriter", "migrate"]
