"""Makes OGBench datasets locally, with OGBench's official settings and scripted experts.

    python -m common.collect pointmaze-medium-navigate --transitions 200000 --workers 2

AntMaze uses an expert of our own (ant.py), because OGBench's is a separate download. Each episode
has a seed of its own, so neither the number of workers nor an interruption changes the files.

    dataset.py   `collect`: makes a whole dataset, or continues one
    plan.py      which datasets can be made, their sizes, settings and files
    workers.py   collects blocks of episodes in parallel
    episodes.py  plays one episode
    experts.py   the policies
    storage.py   files that survive kills and power cuts; the lock
"""
