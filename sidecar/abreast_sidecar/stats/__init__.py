"""Decisions from counts: what is noise, what is slower, what the verdict is. Pure."""
