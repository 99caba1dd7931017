"""Rules for stored pairs: the cache of rules in force, previews, and reapplication after a change."""
