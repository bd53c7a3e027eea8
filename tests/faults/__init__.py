"""What goes wrong on purpose, and what is left of a run then. Counts: docs/guides/reliability.md."""
