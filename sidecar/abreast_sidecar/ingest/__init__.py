"""From Redis to the ledger: reads the stream, compares each pair, and commits the results in batches."""
