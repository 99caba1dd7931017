"""Guard, ramp and webhooks, run by the leader. The decisions in `guard`, `ramp` and `completeness` are pure."""
