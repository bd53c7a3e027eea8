"""Small files of datasets."""

import numpy as np

from common.environments import resolve

MAZE = resolve("pointmaze-medium-stitch")
PUZZLE = resolve("puzzle-3x3-play")


def write(folder, name="pointmaze-medium-stitch-v0.npz", rows=4, **changes):
    """A file for the point maze with a single trajectory; None leaves a key out."""
    arrays = {key: np.zeros((rows, 2), np.float32) for key in ("observations", "actions", "qpos")}
    arrays |= dict(terminals=np.arange(rows) == rows - 1) | changes
    np.savez(folder / name, **{k: np.array(x) for k, x in arrays.items() if x is not None})
    return folder / name
