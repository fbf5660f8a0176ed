"""What runners run in the tests; a module of its own, for each of their processes imports it."""

import functools
import itertools
import os
import time


def sleeping(milliseconds, model, batch):
    return functools.partial(time.sleep, milliseconds / 1e3)


def failing_for_two(model, batch):
    return failing(model, batch) if batch == 2 else sleeping(1, model, batch)


def failing(model, batch):
    raise RuntimeError("no memory")


def killed(model, batch):
    os._exit(9)


def killed_in_its_turn(model, batch):
    calls = itertools.count()
    return lambda: next(calls) < 2 or os._exit(9)  # after the one that compiles and the one that is looked at


def failing_in_its_turn(model, batch):
    calls = itertools.count()
    return lambda: next(calls) < 2 or failing_now()


def failing_now():
    raise RuntimeError("no memory left")
