"""One rank of a training run on synthetic packs; its argument is a JSON object."""

import json
import os
import sys
from pathlib import Path

from tests.zeta.training import NUM_CLASSES, SyntheticSource, tiny_navit
from zeta.console import Console
from zeta.distributed import close_distributed, init_distributed, rank_from_environment
from zeta.exit_codes import ExitCode, RunError
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.run_dir import RunDir
from zeta.train_config import OptimConfig, TrackerConfig, TrainConfig, WandbConfig


def main(arguments):
    run_dir = RunDir(Path(arguments["run_dir"]))
    info = rank_from_environment(os.environ)
    console = Console(run_dir.rank_log(info.rank), info.rank)
    try:
        return int(train(arguments, run_dir, console))
    except (RunError, ValueError) as error:
        console.fatal(str(error))
        return int(ExitCode.NEVER_RESTART)
    finally:
        console.close()


def train(arguments, run_dir, console):
    from zeta.trainer import Trainer

    world = init_distributed()
    config = TrainConfig(**arguments["train"])
    objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
    for hook in HOOKS:
        hook(arguments, world, objective)
    trainer = Trainer(
        model=tiny_navit(**arguments.get("model", {})),
        objective=objective,
        source=SyntheticSource(
            world.rank, world.size, config.packs_per_step, **arguments.get("source", {})
        ),
        run_dir=run_dir,
        world=world,
        console=console,
        train=config,
        optim=OptimConfig(**arguments.get("optim", {})),
        tracker=TrackerConfig(WandbConfig(mode=arguments.get("wandb", "disabled"))),
        config=arguments,
    )
    code = trainer.fit()
    close_distributed()
    return code


HOOKS = []

if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
