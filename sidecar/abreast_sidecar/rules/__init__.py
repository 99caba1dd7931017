"""Judges what is stored again when the rules change."""
