"""The toy: boxes with levers, as an environment and as the code of `Bring your own environment`."""
import json, random
from pathlib import Path

import pytest

from fg_dapo.domains.toy.levers import COLORS, LEVERS, ToyBoxes, make
from fg_dapo.env.checks import check, follow_policy, random_calls
from fg_dapo.env.face import as_turn
from fg_dapo.env.leaks import leaked_secret
from fg_dapo.env.seam import DETAILS, ToolCall, Turn

toy = make()

def test_the_oracle_solves_all_and_no_op_none():
    for split in ("train", "val", "test"):
        report = check(toy, split, n=None, feedbacks=100)
        rows = {row.policy: row.success for row in report.policies}
        assert report.ok, report.findings
        assert rows["oracle"] == 1 and rows["no_op"] == 0 and rows["first_tool_always"] == 0

def test_the_same_seed_gives_the_same_world_and_another_one_another():
    def orders(env): return [env.row_of(t)["order"] for t in env.tasks("test")]
    assert orders(make(1)) == orders(make(1)) != orders(make(2))

def test_a_color_has_one_order_in_all_splits_and_ids_are_unique():
    rows = [toy.row_of(t) for split in ("train", "val", "test") for t in toy.tasks(split)]
    assert len({(r["color"], *r["order"]) for r in rows}) == len(COLORS) and len({r["id"] for r in rows}) == len(rows)
    train = {t.prompt for t in toy.tasks("train")}
    assert all((t.prompt in train) == (t.slices["wording"] == "seen") for s in ("val", "test") for t in toy.tasks(s))

@pytest.mark.parametrize("detail", DETAILS)
def test_no_feedback_holds_a_stamp_and_observed_tells_no_lever_that_was_not_reached(detail):
    for i in range(5000):
        task = toy.tasks("train")[i % 64]
        played = follow_policy(toy, random_calls, task, i)
        if played.outcome.success: continue
        text, world = toy.feedback(played.episode, detail), played.episode.world
        assert leaked_secret(text, toy.secrets(task)) is None
        if detail == "observed": assert f"Lever {world.right + 2} " not in text
        if detail == "hint": assert not any(f" {lever}" in text for lever in LEVERS)

def test_following_observed_feedback_opens_the_box_within_four_attempts():
    for task in toy.tasks("test"):
        known = {}
        for attempt in range(4):
            episode = toy.open(task, 0)
            while not episode.done: episode.act(as_turn(("pull", dict(lever=known.get(episode.world.right + 1, "left")))))
            if episode.outcome().success: break
            words = toy.feedback(episode, "observed").replace(".", "").split()
            known |= {int(words[i + 1]): words[i + 3] for i in range(0, len(words), 4)}
        assert episode.outcome().success

def test_demonstrations_are_solved_and_tell_nothing_of_the_colors():
    orders = {}
    for seed in range(400):
        task, turns = toy.demonstrate(random.Random(seed))
        orders.setdefault(task.family, set()).add(tuple(turn.calls[0].arguments["lever"] for turn, _ in turns))
        assert turns[-1][1] == []
        episode = toy.open(task, 0)
        for turn, replies in turns: assert episode.act(turn) == replies
        assert episode.outcome().success
    assert all(len(some) > 20 for some in orders.values())

def test_a_success_is_played_again_in_other_words():
    for task in toy.tasks("train"):
        turns = follow_policy(toy, toy.policies()["oracle"], task).turns
        again, steps = toy.reenact(task, turns, random.Random(1))
        episode = toy.open(again, 0)
        for turn in steps: episode.act(turn)
        assert episode.outcome().success and again.id != task.id and again.family == task.family
