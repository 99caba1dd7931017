"""Rules for stored pairs: previews, and reapplication after a change."""
