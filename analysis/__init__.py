"""Reading of runs, statistics, tables and figures, for plot.py, video.py and benchmarks/."""
