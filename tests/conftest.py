"A policy that has hardly been warmed up: it solves nothing, but everything runs on it, in a second or two."
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)

@pytest.fixture(scope="session")
def raw_policy(tmp_path_factory):
    from fg_dapo.policy import WarmStart, warmstart
    recipe = WarmStart(copy_steps=2, steps=4, hedged_steps=2, explored_steps=2, rows=4, copy_rows=4, tokenizer_texts=400, eval_every=100)
    return warmstart(tmp_path_factory.mktemp("policy") / "raw", recipe=recipe, progress=False)

@pytest.fixture(scope="session")
def world():
    from fg_dapo.world.records import load_world
    return load_world(ROOT / "data")

@pytest.fixture
def small(raw_policy):
    "Overrides of a run that takes a second a step."
    return [f"policy.checkpoint={raw_policy}", f"data.folder={ROOT / 'data'}", "train.steps=3", "train.tasks_per_step=2", "train.rollouts=4", "train.checkpoint_every=1",
        "train.eval_every=0", "train.threads=1", "limits.max_new_tokens=12", "limits.tool_calls=3", "algorithm.transfer.updates=2", "algorithm.transfer.rows=4"]
