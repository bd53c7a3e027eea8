"""Real runs of every script, of seconds each."""
