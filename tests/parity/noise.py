"""Puts the official code's noise in the place of a script's random draws."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

from tests.parity.cases import DISTRIBUTIONS, DRAWN_TRANSPOSED


def as_used(name, array):
    """A named draw as the official code used it, (B, A), not as it drew it."""
    if name in DRAWN_TRANSPOSED:
        return array.reshape(array.shape[::-1]).T
    return array


class Noise:
    """Answers the draws that a script's functions make from named arrays.

    A draw is recognised by the function of the script in which it happens (a loss, or
    `sample_actions`), by its distribution, and by its size. So nothing depends on the order of the
    losses, on keys, on names of local variables or on the order of unlike draws in one loss.
    """

    def __init__(self, names, values):
        """`names`: function -> names of its draws; `values`: name -> array."""
        self.function = None  # the function that is running
        self.unused = {
            function: {name: as_used(name, values[name]) for name in drawn}
            for function, drawn in names.items()
        }

    def draw(self, distribution, key, shape=(), *args, **kwargs):
        """Takes the place of `jax.random.<distribution>`."""
        size = jnp.empty(shape).size
        for name, array in self.unused[self.function].items():
            if DISTRIBUTIONS.get(name, "normal") == distribution and array.size == size:
                return self.unused[self.function].pop(name).reshape(shape)
        left = list(self.unused[self.function])
        raise AssertionError(f"{self.function} draws {distribution} {shape}; left are {left}")

    def entering(self, function, name):
        """`function`, whose draws are answered with what belongs to `name`."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            if self.function is not None:  # A loss that calls `sample_actions` stays the one.
                return function(*args, **kwargs)
            self.function = name
            try:
                return function(*args, **kwargs)
            finally:
                self.function = None

        return call

    @contextlib.contextmanager
    def replacing(self, script):
        """Within this block the script draws from here. At its end everything has been drawn."""
        with pytest.MonkeyPatch.context() as patch:
            for distribution in ("normal", "uniform", "randint"):
                draw = functools.partial(self.draw, distribution)
                patch.setattr(jax.random, distribution, draw)
            for name in self.unused:
                patch.setattr(script, name, self.entering(getattr(script, name), name))
            yield
        left = {function: list(arrays) for function, arrays in self.unused.items() if arrays}
        assert not left, f"not drawn: {left}"
