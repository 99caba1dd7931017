"""Comparing what two versions did with one request. Pure: no network, no database, no clock."""
