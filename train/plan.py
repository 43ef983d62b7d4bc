"""Say what a training run needs before it starts: parameters, memory, communication, time, and whether it fits.

Needs neither data nor a GPU: `python -m train.plan config=configs/paper/7b.yaml world_size=256 gpu=h200`.
"""

from data.strict_json import dumps
from train.config import load_config, run_program
from train.llm_folder import with_llm
from train.planning.plan import PlanConfig, make_plan
from train.planning.plan_text import plan_text

CONFIG = PlanConfig
fill = with_llm  # what `--resolve` runs (train/config.py)


def main(argv: list[str]) -> None:
    config = with_llm(load_config(CONFIG, argv))
    plan = make_plan(config)
    print(dumps(plan) if config.json else plan_text(config, plan))


if __name__ == "__main__":
    run_program(main)
