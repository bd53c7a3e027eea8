"""OGBench's ant: the environment of its expert, and the expert with which `common.collect` plays.

    python -m baselines.sac --env online-ant-xy              trains it
    python -m common.ant runs/sac/online-ant-xy/default      keeps its policy in common/ant.npz
"""

import gymnasium
from ogbench.online_locomotion.ant import AntEnv
from ogbench.online_locomotion.wrappers import GymXYWrapper

# The ant also observes a unit direction, another after 100 steps; rewards are the way along it.
gymnasium.register("OnlineAntXY-v0", lambda: GymXYWrapper(AntEnv()), max_episode_steps=1000)
