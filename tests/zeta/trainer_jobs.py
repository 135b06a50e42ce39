"""Jobs of test_trainer: training runs on synthetic packs, with accidents on request."""

import ctypes
import json
import os
import resource
import signal
import time
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch

import zeta.checkpoint.directory
import zeta.checkpoint.hashed_file
import zeta.checkpoint.memory_files
import zeta.checkpoint.store
import zeta.objectives.classification
import zeta.train.engine
import zeta.train.trainer
from tests.zeta.objectives.foreign_moving_teacher import MovingTeacher, StudentAndTeacher
from tests.zeta.training import (
    NUM_CLASSES,
    SyntheticSource,
    shard_small_parameters,
    tiny_navit,
)
from zeta.checkpoint.memory_files import MemoryFiles
from zeta.checkpoint.store import CheckpointStore
from zeta.distributed import rank_from_environment
from zeta.exit_codes import ExitCode, RunError, UnsavedError
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.run.console import Console
from zeta.run.directory import RunDir
from zeta.run.requests import RequestFiles
from zeta.run.signals import ONE_PRESS_SECONDS
from zeta.run.watchdog import Watchdog, WatchdogConfig
from zeta.tracking.config import TrackerConfig, WandbConfig
from zeta.train.config import EvaluateConfig, OptimConfig, TrainConfig
from zeta.train.evaluation import HeldOut
from zeta.train.probing.scores import ProbeImages
from zeta.zero.start import close_distributed, init_distributed

shard_small_parameters()


def train(arguments):
    """One run, or each of `runs` in turn in one process group; returns the exit code."""
    os.environ |= arguments.pop("environment", {})  # not a part of the config
    info = rank_from_environment(os.environ)
    runs = arguments.get("runs", [arguments])
    console = Console(RunDir(Path(runs[0]["run_dir"])).rank_log(info.rank), info.rank)
    try:
        world = init_distributed()
        code = 0
        for run in runs:
            code = max(code, _one_run(run, world, console))
        return code
    except (RunError, ValueError) as error:
        console.fatal(str(error))
        return int(ExitCode.NEVER_RESTART)
    except UnsavedError as error:
        console.fatal(str(error))
        return 1
    finally:
        console.close()
        close_distributed()


def _one_run(arguments, world, console):
    from zeta.train.trainer import Trainer
    from zeta.zero.build import build_for_training

    evaluate = EvaluateConfig(**arguments.get("evaluate", {}))
    train_config = TrainConfig(**arguments["train"], evaluate=evaluate)
    objective = OBJECTIVES[arguments.get("objective", "softmax")]()
    source = SyntheticSource(
        world.rank, world.size, train_config.packs_per_step, **arguments.get("source", {})
    )
    for name, options in arguments.get("accidents", {}).items():
        ACCIDENTS[name](world, objective=objective, source=source, **options)
    watchdog = None
    if limits := arguments.get("watchdog"):
        heartbeat = RunDir(Path(arguments["run_dir"])).rank_heartbeat(world.rank)
        config = WatchdogConfig(**limits)
        watchdog = Watchdog(heartbeat, world.rank, config, console.fatal)
    trainer = Trainer(
        model=build_for_training(
            partial(
                MODELS.get(arguments.get("objective"), tiny_navit), **arguments.get("model", {})
            ),
            train_config.zero,
            world,
            trainable=train_config.trainable,
            seed=train_config.seed,
        ),
        objective=objective,
        source=source,
        run_dir=RunDir(Path(arguments["run_dir"])),
        world=world,
        console=console,
        train=train_config,
        optim=OptimConfig(**arguments.get("optim", {"lr": 1e-3, "schedule": "constant"})),
        tracker=TrackerConfig(WandbConfig(**{"mode": "disabled", **arguments.get("wandb", {})})),
        config=arguments,
        watchdog=watchdog,
        held_out=_held_out(world, **arguments.get("held_out", {})),
        probe=_probe(world, **arguments.get("probe", {})),
        epoch_images=arguments.get("epoch_images"),
    )
    code = int(trainer.fit())
    if watchdog is not None:
        watchdog.close()
    return code


def _held_out(world, *, steps=0, lanes=5, tokens=(), images=40):
    """Held-out packs of so many steps, at the size of training and at further budgets."""

    reject_at = (1,) if world.is_main else ()

    def open_source():
        return SyntheticSource(world.rank, world.size, lanes, steps, reject_at)

    sizes = [None, *tokens] if steps else []
    return [HeldOut(size, images, 3, f"{steps}/{lanes}", open_source) for size in sizes]


def _probe(world, *, steps=0, lanes=5):
    """Labelled packs of so many steps to learn from, and of three steps to classify."""
    if not steps:
        return None
    train, test = (
        HeldOut(
            None, 50, 0, str(count), partial(SyntheticSource, world.rank, world.size, lanes, count)
        )
        for count in (steps, 3)
    )
    return ProbeImages(train, test, NUM_CLASSES, ("knn", "linear_probe"))


class Brightness:
    """A third objective: output 0 predicts the label as a number. The loop does not know it."""

    def place(self, device, dtype):
        pass

    def facts(self):
        return {}

    def start(self, model):
        pass

    def begin_step(self, step):
        pass

    def finish_step(self, model, step):
        pass

    def check(self, batch):
        pass

    def loss_sum(self, outputs, batch):
        return ((outputs[:, 0] - batch.labels) ** 2 * batch.weights).sum()

    def counts(self, outputs, batch):
        close = (outputs[:, 0] - batch.labels).abs() < 0.5
        return {"close": (close & (batch.weights > 0)).sum()}


class Told(Brightness):
    """Prints what it is told of the run, a line each."""

    def start(self, model):
        self._write("start")

    def begin_step(self, step):
        self._write(["begin", *astuple(step)])

    def finish_step(self, model, step):
        self._write(["finish", *astuple(step)])

    def _write(self, what):
        print("TOLD", json.dumps(what), flush=True)


def student_and_teacher(seed=0):
    return StudentAndTeacher(tiny_navit(num_classes=1), tiny_navit(num_classes=1), seed)


MODELS = {"moving": student_and_teacher}
OBJECTIVES = {
    "told": Told,
    "moving": lambda: MovingTeacher(ObjectiveConfig("moving"), 1),
    "softmax": lambda: build_objective(ObjectiveConfig(), NUM_CLASSES),
    "brightness": Brightness,
}


# Accidents: each patches something on the rank it is for.


def _before_call(owner, name, action, count):
    """Run `action` before the `count`-th call of a function."""
    original = getattr(owner, name)
    seen = [0]

    def wrapped(*args, **kwargs):
        seen[0] += 1
        if seen[0] == count:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _half_write_and_die():
    original = zeta.checkpoint.memory_files.write_hashed

    def half(root, path, parts):
        original(root, path, parts)
        os.truncate(path, path.stat().st_size // 2)
        _kill()

    zeta.checkpoint.memory_files.write_hashed = half


_PHASES = {
    "loading": (CheckpointStore, "load"),
    "train step": (zeta.train.engine.TrainEngine, "_finish_step"),
    "save begins": (CheckpointStore, "begin"),
    "half copied": (zeta.checkpoint.store, "random_state"),
    "between files": (zeta.checkpoint.hashed_file, "_to_disk"),
    "written": (CheckpointStore, "finish"),
    "before manifest": (zeta.checkpoint.store, "write_manifest"),
    "before rename": (zeta.checkpoint.store, "sync"),
    "before latest": (CheckpointStore, "_point_latest"),
    "before prune": (CheckpointStore, "_prune"),
    "half-deleted": (zeta.checkpoint.store.shutil, "rmtree"),
}


def kill(world, *, phase, ranks, count=1, **_):
    """SIGKILL of these ranks when they reach a phase for the `count`-th time."""
    if world.rank not in ranks:
        return
    if phase == "half a file":
        _before_call(CheckpointStore, "begin", _half_write_and_die, count)
    else:
        owner, name = _PHASES[phase]
        _before_call(owner, name, _kill, count)


def raise_signal(world, *, number, rank, count, times=1, **_):
    """A signal to one rank in the middle of its `count`-th step."""
    if world.rank == rank:

        def send():
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(1.5 * ONE_PRESS_SECONDS)

        _before_call(zeta.train.engine.TrainEngine, "train_step", send, count)


def create(world, *, files, **_):
    """Somebody creates files while rank 1 is in a step: {path: the how manieth}."""
    zeta.train.trainer.RequestFiles = partial(RequestFiles, look_s=0)
    if world.rank == 1:
        for path, count in files.items():
            _before_call(zeta.train.engine.TrainEngine, "train_step", Path(path).touch, count)


def in_evaluation(world, *, number, rank, count, **_):
    """A signal to one rank before it counts the `count`-th pack of its evaluations."""
    if world.rank == rank:
        tally = zeta.objectives.classification.ClassificationTally
        _before_call(tally, "add", lambda: os.kill(os.getpid(), number), count)


def _around_write(world, rank, count, prepared):
    """Let this rank write its files within `prepared(folder)` in its `count`-th save."""
    if world.rank != rank:
        return
    original = MemoryFiles.write
    seen = [0]

    def limited(files, root):
        seen[0] += 1
        if seen[0] != count:
            return original(files, root)
        with prepared(root):
            return original(files, root)

    MemoryFiles.write = limited


def disk_full(world, *, rank, count, **_):
    """A file of this rank is on a device without any room in its `count`-th save."""

    @contextmanager
    def on_full_device(root):
        folder = root / zeta.checkpoint.directory.RANKS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank:05d}.pt").symlink_to("/dev/full")
        yield

    _around_write(world, rank, count, on_full_device)


def small_disk(world, *, rank, count, **_):
    """What this rank writes of DeepSpeed's files in its `count`-th save lies on a 16 KiB tmpfs.

    The mount is seen by its writing thread alone: every other rank writes to the real folder.
    """

    @contextmanager
    def on_tmpfs(root):
        folder = root / zeta.checkpoint.directory.ZERO
        folder.mkdir(parents=True, exist_ok=True)
        with mounted_tmpfs(folder, "16k"):
            yield

    _around_write(world, rank, count, on_tmpfs)


@contextmanager
def mounted_tmpfs(folder, size):
    """A tmpfs over `folder`, for this thread alone; raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    new_mounts, private = 0x00020000, (1 << 14) | (1 << 18)
    check(libc.unshare(new_mounts))
    check(libc.mount(b"none", b"/", None, private, None))
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))
    try:
        yield
    finally:
        check(libc.umount2(os.fsencode(folder), 2))


def no_room(world, *, rank, **_):
    """No file of this rank can grow, its log included, from its 2nd save to after its 3rd."""
    if world.rank == rank:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        set_limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        _before_call(CheckpointStore, "begin", lambda: set_limit((0, limit[1])), 2)
        _before_call(zeta.train.engine.TrainEngine, "train_step", lambda: set_limit(limit), 8)


def nan_loss(world, *, rank, first, last, objective, **_):
    """The loss of this rank is NaN from its `first` pack to its `last`."""
    if world.rank != rank:
        return
    original, seen = objective.loss_sum, [0]

    def loss_sum(outputs, batch):
        seen[0] += 1
        value = original(outputs, batch)
        return value * float("nan") if first <= seen[0] <= last else value

    objective.loss_sum = loss_sum


def bad_label(world, *, rank, step, source, **_):
    """A label outside the classes on one rank."""
    if world.rank != rank:
        return
    original = source._packs

    def packs(index):
        made = original(index)
        if index == step:
            weighted = next(pack for pack in made.packs if pack.num_images)
            weighted.labels[torch.nonzero(weighted.weights)[0]] = 77
        return made

    source._packs = packs


def slow(world, *, rank, where, seconds, source, objective, **_):
    """This rank takes longer for every draw of data, or for every forward pass."""
    if world.rank == rank:
        owner, name = {"data": (source, "_packs"), "forward": (objective, "loss_sum")}[where]
        original = getattr(owner, name)

        def slowed(*args):
            time.sleep(seconds)
            return original(*args)

        setattr(owner, name, slowed)


def hang(world, *, rank, where, source, objective, **_):
    """This rank never comes back from the second call: of its data, its forward pass, a save."""
    if world.rank != rank:
        return
    owner, name = {
        "data": (source, "_packs"),
        "train": (objective, "loss_sum"),
        "train, with Python's lock": (objective, "loss_sum"),
        "save": (CheckpointStore, "begin"),
    }[where]
    sleep = time.sleep if "lock" not in where else ctypes.PyDLL(None).sleep
    _before_call(owner, name, lambda: sleep(1000), 3 if where == "train" else 2)


ACCIDENTS = {
    "hang": hang,
    "slow": slow,
    "kill": kill,
    "raise_signal": raise_signal,
    "in_evaluation": in_evaluation,
    "create": create,
    "disk_full": disk_full,
    "small_disk": small_disk,
    "no_room": no_room,
    "nan_loss": nan_loss,
    "bad_label": bad_label,
}
