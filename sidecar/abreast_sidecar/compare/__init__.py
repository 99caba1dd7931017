"""Find the differences between two answers to one request. Pure: no network, no database, no clock."""
