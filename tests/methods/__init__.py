"""Exact tests of the scripts' losses and updates, and what all scripts promise alike."""
