"""What contributors run: shared blocks, diffs between methods, and generated pages, style."""
