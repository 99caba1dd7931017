"""Decides about users' traffic from evidence: the guard, the ramp, and how webhooks are signed. Pure."""
