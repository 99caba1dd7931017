"""Servers that Abreast starts by itself, for `abreast up`, the demo and the tests."""
