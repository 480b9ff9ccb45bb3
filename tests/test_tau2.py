"tau2's telecom domain: gold solves, doing nothing does not, feedback tells no secret, the same calls end alike."
import json, random

import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("inspect_evals", reason="the extra tau2 is not installed")

from fg_dapo.core import rng_for
from fg_dapo.domains.tau2.telecom import (BLIND_LIST, READINGS, Telecom, TelecomEpisode, blind_fix, check_then_fix,
    gold_policy, held_out_pairs, idle_policy, official_splits, play_telecom, random_calls, solved_by,
    telecom_demonstration, telecom_feedback, telecom_split, telecom_tasks)
from fg_dapo.domains.tau2.telecom_world import TelecomState, call_problem, clone, run_call, telecom_schemas
from fg_dapo.env.seam import DETAILS, Demonstrates, Environment, Episode, Reference, ToolCall, Turn

EVERY = list(telecom_tasks().values())


def test_gold_solves_every_task_and_nothing_solves_none():
    assert len(EVERY) == 2285
    assert solved_by(gold_policy, EVERY) == 1.0
    assert solved_by(idle_policy, EVERY) == 0.0


def test_the_floor_and_the_procedure():
    some = EVERY[::5]
    floor = Telecom().floor
    rng, rates = random.Random(0), []
    for _ in range(32):
        keep = rng.getrandbits(len(BLIND_LIST))
        rates.append(solved_by(lambda t, e, r: blind_fix(t, e, r, keep), some))
    rates.append(solved_by(blind_fix, some))
    assert 0.1 < max(rates) <= floor
    assert solved_by(random_calls, some) <= 0.01
    assert solved_by(check_then_fix, some) >= 0.95


def test_it_is_an_environment():
    env = Telecom()
    assert isinstance(env, Environment) and isinstance(env, Reference) and isinstance(env, Demonstrates)
    assert isinstance(env.open(env.tasks("val")[0]), Episode)


def test_splits_do_not_overlap_and_hold_out_pairs():
    ours = telecom_split(0)
    ids = [i for part in ours.values() for i in part]
    assert len(ids) == len(set(ids))
    assert {k: len(v) for k, v in official_splits().items()}["official_test"] == 40
    for i in ours["train"]:
        faults = set(telecom_tasks()[i].faults)
        assert not any(pair <= faults for pair in held_out_pairs(0))
    assert telecom_split(1) != ours
    seen = {t.slices["seen"] for t in Telecom().tasks("test")}
    assert seen == {"new", "held-out"}
    with pytest.raises(ValueError, match="no split 'tset'; there are train, val, test"): Telecom().tasks("tset")


def failing_episodes(n):
    "Episodes of four policies that fail, with their tasks."
    env = Telecom()
    tasks = [t for split in ("train", "val", "test") for t in env.tasks(split)]
    policies = (idle_policy, random_calls, blind_fix, check_then_fix)
    made, i = [], 0
    while len(made) < n:
        task, rng = tasks[i % len(tasks)], rng_for(0, "failing", i)
        episode = env.open(task)
        turns = policies[i % 4](task, episode, rng)
        turn, limit = next(turns), rng.randrange(1, 12)
        for _ in range(limit):
            replies = episode.act(turn)
            if episode.done: break
            try: turn = turns.send(replies)
            except StopIteration: break
        episode.stop()
        if not episode.outcome().success: made.append((task, episode))
        i += 1
    return env, made


def test_observed_feedback_holds_no_secret_in_5000_failures():
    env, failures = failing_episodes(5000)
    for task, episode in failures:
        for detail in ("hint", "observed"):
            text = env.feedback(episode, detail)
            assert text and "\n" not in text and "<" not in text
            for secret in env.secrets(task): assert secret not in text, (task.id, detail, secret, text)


def test_full_feedback_solves_training_tasks_and_is_not_told_on_test_tasks():
    env = Telecom()
    for task in env.tasks("train")[:50]:
        episode = env.open(task)
        episode.act(Turn("Done."))
        gold = telecom_tasks()[task.id].gold
        text = env.feedback(episode, "full")
        assert all(name in text for name, _ in gold)
    for task in env.tasks("test")[:50] + env.tasks("official_test"):
        episode = env.open(task)
        episode.act(Turn("Done."))
        assert env.feedback(episode, "full") == env.feedback(episode, "observed")


def test_what_observed_feedback_says_of_the_phone_is_so():
    "Each reading that is told as off was off at the last look: the state is asked directly."
    told = 0
    for _, episode in failing_episodes(400)[1]:
        text = telecom_feedback(episode, "observed")
        device = episode.state.user.device
        if "Airplane mode was on." in text:
            told += 1
            assert device.airplane_mode
        if "No SIM card was detected." in text: assert device.sim_card_missing
        if "A VPN was connected." in text: assert device.vpn_connected
        if "Wi-Fi calling was on." in text: assert device.wifi_calling_enabled
        if "Data saver was on." in text: assert device.data_saver_mode
    assert told > 5


def test_same_calls_same_state():
    "Also where a new bill is made, which the package names at random."
    def run():
        e = TelecomEpisode(EVERY[700])
        e.act(Turn(calls=(ToolCall("refuel_data", dict(customer_id="C1001", line_id="L1002", gb_amount=2.0)),)))
        e.act(Turn(calls=(ToolCall("refuel_data", dict(customer_id="C1002", line_id="L1004", gb_amount=1.0)),)))
        return e.state.agent.db.model_dump_json(), e.state.user.db.model_dump_json(), [r.content for _, r in e.log]
    assert run() == run()
    a = telecom_demonstration(rng_for(3, "d"))
    assert a == telecom_demonstration(rng_for(3, "d"))


def test_states_share_nothing():
    first, second = TelecomState(), TelecomState()
    first.user.break_vpn()
    first.agent.suspend_line("C1001", "L1002", "test")
    first.user.device.app_statuses["messaging"].permissions.sms = False
    untouched = TelecomState()
    assert second.user.db == untouched.user.db and second.agent.db == untouched.agent.db
    assert second.user.default_vpn_details == untouched.user.default_vpn_details
    assert clone(first.agent.db) == first.agent.db


HOSTILE = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
NAMES = [s["function"]["name"] for s in telecom_schemas()]


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([*NAMES, "break_vpn", "__init__", "db", "set_user_info", ""]), arguments=HOSTILE, data=st.data())
def test_no_call_of_a_model_raises(name, arguments, data):
    if name in NAMES and data.draw(st.booleans()):
        wanted = next(s for s in telecom_schemas() if s["function"]["name"] == name)["function"]["parameters"]
        arguments = {p: data.draw(HOSTILE) for p in wanted["properties"]}
    state = TelecomState()
    answer, failed = run_call(state, name, arguments)
    json.dumps(answer)
    if name not in NAMES: assert failed


def test_wrong_arguments_are_answered_with_what_is_wrong():
    assert call_problem("refuel_data", dict(customer_id="C1001", line_id="L1002")) == "refuel_data needs gb_amount"
    assert call_problem("toggle_data", dict(on=True)) == "toggle_data does not take 'on'"
    assert call_problem("refuel_data", dict(customer_id="C1001", line_id="L1002", gb_amount=True)) == "gb_amount must be number, got bool"
    assert call_problem("toggle_data", []) == "arguments must be an object, got list"
    assert call_problem("turn_data_on", {}).startswith("no tool 'turn_data_on'; the tools are ")


def test_readings_are_found_in_real_replies():
    "Each reading is seen off in some broken phone, and fine after it was mended."
    seen = set()
    looks = ("check_network_status", "check_sim_status", "check_network_mode_preference", "check_data_restriction_status",
        "check_apn_settings", "check_wifi_calling_status", "check_vpn_status")
    for task in EVERY[::7]:
        episode = TelecomEpisode(task, max_calls=50)
        for name in looks: episode.act(Turn(calls=(ToolCall(name),)))
        episode.act(Turn(calls=(ToolCall("check_app_permissions", dict(app_name="messaging")),)))
        episode.act(Turn(calls=(ToolCall("get_details_by_id", dict(id="L1002")),)))
        text = telecom_feedback(episode, "observed")
        seen |= {r.says for r in READINGS if r.says in text}
    assert seen == {r.says for r in READINGS}
