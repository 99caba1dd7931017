"""Find the differences between two responses to one request. Pure: no network, no database, no clock."""
