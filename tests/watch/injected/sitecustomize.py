"""Trouble for a training process, from outside: Python imports this at its start when the folder is on PYTHONPATH.

INJECT is JSON: a list of {"what", "rank" (all if left out), "step", …}, "what" being a function below.
Steps are counted here: one ends with each call of the engine's step.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import random
import sys
import threading
import time

steps_done = 0


def _patch_engine(module) -> None:
    for name in ("ZeroEngine", "AccelerateEngine"):
        engine = getattr(module, name, None)
        if engine is None:
            continue
        forward, step = engine.forward, engine.step

        def faulty_forward(self, *args, _forward=forward):
            if self.module.training:
                for fault in FAULTS:
                    WHAT[fault["what"]](fault)
            return _forward(self, *args)

        def counting_step(self, *args, _step=step, **options):
            global steps_done
            result = _step(self, *args, **options)
            steps_done += 1
            return result

        engine.forward, engine.step = faulty_forward, counting_step


def _patch_loader(module) -> None:
    steps = module.TrainLoader.steps

    def faulty_steps(self, start):
        for micro_batches in steps(self, start):
            for fault in FAULTS:
                if fault["what"] == "hang_in_data" and steps_done >= fault["step"]:
                    threading.Event().wait()
            yield micro_batches

    module.TrainLoader.steps = faulty_steps


def _patch_probes(module) -> None:
    knn_top1 = module.knn_top1

    def faulty_knn(*arguments, moved):
        for fault in FAULTS:
            if fault["what"] == "hang_in_probe" and steps_done >= fault["step"]:
                threading.Event().wait()
            if fault["what"] == "long_probe":
                until = time.monotonic() + fault["seconds"]
                while time.monotonic() < until:
                    time.sleep(0.2)
                    moved()
        top1 = knn_top1(*arguments, moved=moved)
        lower = any(fault["what"] == "low_probe" and steps_done >= fault["step"] for fault in FAULTS)
        return 0.0 if lower else top1

    module.knn_top1 = faulty_knn


def hold(fault) -> None:
    """Native code that keeps the interpreter's lock and never returns."""
    if steps_done >= fault["step"]:
        reader, _ = os.pipe()
        ctypes.PyDLL(None).read(reader, ctypes.create_string_buffer(1), 1)


def hang(fault) -> None:
    if steps_done >= fault["step"]:
        threading.Event().wait()


def slow(fault) -> None:
    if steps_done >= fault.get("step", 0):
        time.sleep(fault["seconds"])


def load(fault) -> None:
    """Now and then, and never the same rank: what a busy machine does."""
    if random.random() < 0.3:
        time.sleep(random.random() * fault["seconds"])


def clock(fault) -> None:
    """The wall clock jumps back and forth by an hour."""
    sign = 1 if steps_done % 4 < 2 else -1
    time.time = lambda: _real_time() + sign * 3600.0


def elsewhere(_) -> None:
    """Not done in a step, but by the loader or by probes."""


_real_time = time.time
WHAT = {f.__name__: f for f in (hold, hang, slow, load, clock)}
WHAT.update(dict.fromkeys(("hang_in_data", "hang_in_probe", "long_probe", "low_probe"), elsewhere))
FAULTS = [
    fault
    for fault in json.loads(os.environ.get("INJECT", "[]"))
    if "rank" not in fault or str(fault["rank"]) == os.environ.get("RANK", "0")
]
PATCHES = {
    "pretrain.engine.zero": _patch_engine,
    "pretrain.engine.debug": _patch_engine,
    "pretrain.data.loader": _patch_loader,
    "pretrain.probes.suite": _patch_probes,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finders find, and patches what they load."""

    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if FAULTS:
    sys.meta_path.insert(0, _Finder())
