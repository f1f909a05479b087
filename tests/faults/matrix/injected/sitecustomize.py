"""Faults from inside, for processes of a run under test. Python imports this by itself from PYTHONPATH.

MATRIX_FAULTS names a JSON list of faults; without it nothing happens here. Each fault is an object:

    do      what: see `Fault`
    at      where: "forward" (before it, in a step), "loss" (after it), "stepped" (after the step), "part" (before a
            rank's part of a checkpoint is written), "manifest" (before rank 0 writes one), "fsync", "port" (when the
            launcher looks for a free one)
    rank    which rank; left out, every one
    step    which optimizer step, counted over the whole run; left out, every one
    mark    a file whose name gets the rank appended, made exclusively with the moment in it when the fault
            strikes: once a run and rank then, however often that is started again
    …       what the fault itself wants

Two more variables name folders: MATRIX_POSITIONS gets what each rank trained on, MATRIX_LOADED what each held
when it had loaded a checkpoint.

The code under test holds no hook for this: functions are replaced when their modules have been imported.
Standard library only, as it runs in every process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import time


class Fault:
    """One line of the list; a method each thing it can do."""

    def __init__(self, *, do, at, rank=None, step=None, mark=None, **wants):
        self.do, self.at, self.rank, self.step, self.mark, self.wants = do, at, rank, step, mark, wants

    def is_due(self, at, step=None):
        if at != self.at or (self.step is not None and step != self.step):
            return False
        if self.rank not in (None, RANK):
            return False
        if self.mark is None:
            return True
        try:
            with open(f"{self.mark}.{RANK}", "x") as file:
                file.write(repr(time.monotonic()))
        except FileExistsError:
            return False
        return True

    def strike(self, value=None):
        """What becomes of `value`, the loss or the engine."""
        return getattr(self, self.do)(value)

    def kill(self, value):
        os.kill(os.getpid(), 9)

    def signal(self, value):
        os.kill(os.getpid(), self.wants["signum"])
        return value

    def stop(self, value):
        os.kill(os.getpid(), 19)
        return value

    def hold_gil(self, value):
        """Native code that keeps the interpreter's lock, and that no signal wakes."""
        import ctypes

        reader, _ = os.pipe()
        ctypes.PyDLL(None).read(
            reader, ctypes.create_string_buffer(1), 1
        )  # PyDLL does not let go of the lock
        return value

    def sleep(self, value):
        time.sleep(self.wants["seconds"])
        return value

    def await_file(self, value):
        """Until something else has got so far."""
        while not os.path.exists(self.wants["path"]):
            time.sleep(0.01)
        return value

    def limit_files(self, value):
        """The kernel ends this process when it has written `bytes` of one file: a kill at that very byte."""
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.wants["bytes"], self.wants["bytes"]))
        return value

    def multiply(self, value):
        """The loss, by `factor` ("nan" as well): where one of `positions` is among the batch's, if they are given."""
        return value * float(self.wants["factor"])

    def flip_weight(self, value):
        """A high bit of the first weight that the network computes with, which the optimizer does not know of."""
        import torch

        parameter = next(p for p in value.module.parameters() if p.requires_grad)
        bits = parameter.data.view(-1).view(torch.int16 if parameter.dtype == torch.bfloat16 else torch.int32)
        bits[0] ^= 1 << self.wants.get("bit", 12)
        return value

    def give_port(self, value):
        return self.wants["port"]

    def jump_clock(self, value):
        shift, true_time = self.wants["seconds"], time.time
        time.time = lambda: true_time() + shift
        return value


def read_faults():
    with open(os.environ["MATRIX_FAULTS"]) as file:
        return [Fault(**fault) for fault in json.load(file)]


def strike_all(at, step=None, value=None):
    for fault in FAULTS:
        if fault.is_due(at, step):
            value = fault.strike(value)
    return value


def holds(fault, batch):
    """Whether the fault is tied to positions of the sample order, and none of them is in this batch."""
    wanted = fault.wants.get("positions")
    return wanted is None or bool(set(wanted) & set(batch["positions"].tolist()))


def patch_engine(engine_class):
    forward, step = engine_class.forward, engine_class.step
    begun = {}  # engine -> steps it began

    def current(engine):
        """The optimizer step that is under way: how many were done when the engine was loaded, and since."""
        if engine not in begun:
            begun[engine] = engine.optimizer_steps + 1
        return begun[engine]

    def new_forward(self, images, batch):
        if not self.module.training:
            return forward(self, images, batch)
        strike_all("forward", current(self), self)
        log_positions(current(self), batch)
        loss, metrics = forward(self, images, batch)
        for fault in FAULTS:
            if fault.at == "loss" and holds(fault, batch) and fault.is_due("loss", current(self)):
                loss = fault.strike(loss)
        return loss, metrics

    def new_step(self, lr, **options):
        number = current(self)
        norm = step(self, lr, **options)
        begun[self] = number + 1
        strike_all("stepped", number, self)
        return norm

    engine_class.forward, engine_class.step = new_forward, new_step


def log_positions(step, batch):
    """What was trained on, for whoever proves that each position came once: MATRIX_POSITIONS is a folder."""
    folder = os.environ.get("MATRIX_POSITIONS")
    if folder:
        seen = batch["positions"][batch["weights"] > 0].tolist()
        line = json.dumps({"step": step, "pid": os.getpid(), "time": time.monotonic(), "positions": seen})
        with open(os.path.join(folder, f"rank-{RANK}.jsonl"), "a") as file:
            file.write(line + "\n")


def patch_zero(module):
    patch_engine(module.ZeroEngine)


def patch_debug(module):
    patch_engine(module.AccelerateEngine)


def patch_manifest(module):
    to_json = module.Manifest.to_json

    def new_to_json(self):
        strike_all("manifest", self.step)
        return to_json(self)

    module.Manifest.to_json = new_to_json


def patch_save(module):
    """Wherever a rank's part is written: by the rank itself, or by its writer."""
    for name in ("_write_slices", "write_part"):
        if hasattr(module, name):
            setattr(module, name, with_part(getattr(module, name)))


def with_part(write):
    def new_write(*args, **kwargs):
        steps = [re.search(r"step-(\d+)", str(value)) for value in (*args, *kwargs.values())]
        strike_all("part", next((int(found[1]) for found in steps if found), None))
        return write(*args, **kwargs)

    return new_write


def patch_files(module):
    sync = module.sync

    def new_sync(path):
        strike_all("fsync")
        sync(path)

    module.sync = new_sync


def patch_processes(module):
    free_port = module.free_port
    module.free_port = lambda *wanted: strike_all("port") or free_port(*wanted)


def patch_load(module):
    load_fragments = module.load_fragments

    def new_load_fragments(reader, fragments):
        load_fragments(reader, fragments)
        folder = os.environ.get("MATRIX_LOADED")
        if folder:
            import numpy

            held = {
                f"{f.name}/{kind}/{f.start}": t.numpy() for f in fragments for kind, t in f.tensors.items()
            }
            where = os.path.join(folder, f"{reader.manifest.step}-rank-{RANK}.npz")
            numpy.savez(where, **held)

    module.load_fragments = new_load_fragments


PATCHES = {
    "launch.processes": patch_processes,
    "pretrain.checkpoint.load": patch_load,
    "pretrain.engine.zero": patch_zero,
    "pretrain.engine.debug": patch_debug,
    "pretrain.checkpoint.manifest": patch_manifest,
    "pretrain.checkpoint.save": patch_save,
    "pretrain.checkpoint.staging": patch_save,
    "pretrain.storage.files": patch_files,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds as Python does, and has modules of PATCHES patched once they are loaded."""

    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                PATCHES[name](module)

            spec.loader.exec_module = exec_module
        return spec


RANK = int(os.environ.get("RANK", "0"))
FAULTS: list[Fault] = []
if "MATRIX_FAULTS" in os.environ:
    FAULTS = read_faults()
    sys.meta_path.insert(0, Finder())
