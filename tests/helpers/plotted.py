"""Run folders with made-up evaluations, to be drawn."""

import json

STEPS = (100, 200)
score = lambda task, seed, step: (task + seed + step / 100) / 20  # of our made-up runs


def run_folder(root, script="qam", env="cube-double", name="default", tasks=(1, 2), seeds=(0, 1),
               steps=STEPS, shift=0.0, without=(), **flags):  # fmt: skip
    """A run folder whose successes are `score` + `shift`; rows in `without` are not there."""
    folder = root / script / env / name
    folder.mkdir(parents=True)
    flags = dict(env=env, name=name, seed=seeds[0], num_seeds=len(seeds), lr=3e-4) | flags
    (folder / "config.json").write_text(json.dumps(dict(flags=flags, made_with={})))
    rows = [f"{task},{seed},{step},1.0,{score(task, seed, step) + shift},{step}"
            for step in steps for task in tasks for seed in seeds
            if (task, seed, step) not in without]  # fmt: skip
    head = "task,seed,step,seconds,success,return"
    (folder / "eval.csv").write_text("\n".join([head, *rows, ""]))
    return folder
