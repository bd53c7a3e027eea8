"""What goes wrong on purpose, and what is left of a run then (docs/guides/reliability.md)."""
