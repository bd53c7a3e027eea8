"""Figures, films, benchmarks, documents and the tools that keep them right."""
