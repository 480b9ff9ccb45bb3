"The collapse alarm: every kind at its exact limit, what must never set it off, and what an engine sees of it."
import json

import pytest
from hypothesis import given, settings, strategies as st

from fg_dapo.config import AlarmConfig
from fg_dapo.method.alarm import ABOVE, BELOW, WORDS, Alarm, Watch, alarms, typical

from conftest import ROOT

HEALTHY = dict(acc_cold=.4, acc_guided=.8, bad_call_rate=.1, tool_calls_mean=4.0, entropy=.2, response_tokens_mean=60.0)
KEYS = list(HEALTHY)
SMALL = AlarmConfig(window=3, reference=4)

def rows(n, **changed): return [dict(HEALTHY, **changed) for _ in range(n)]
def kinds(rs, config=SMALL): return [a.name for a in alarms(rs, config)]
def then(**now): return rows(4) + rows(3, **now)

# Medians

@pytest.mark.parametrize("values, want", [([3, 1, 2], 2), ([4, 1, 2, 3], 2.5), ([None, 1, 2], 1.5), ([None, None, 1], None), ([], None), ([None, 1], 1), ([float("nan"), 2, float("inf")], None), (["7", True, 5], None)])
def test_typical(values, want): assert typical([dict(x=v) for v in values], "x") == want
def test_a_key_nobody_has_is_not_judged(): assert typical([dict(), dict()], "x") is None

# Each kind, at its limit and a hair beyond. The reference is HEALTHY: 4 calls, entropy 0.2, 60 tokens, 0.1 bad calls, 0.4 cold and 0.8 guided

@pytest.mark.parametrize("now, want", [
    (dict(tool_calls_mean=1.0), []), (dict(tool_calls_mean=0.999), ["few_calls"]), (dict(tool_calls_mean=0.0), ["few_calls"]), (dict(tool_calls_mean=40.0), []),
    (dict(entropy=0.2 * 0.1), []), (dict(entropy=0.0199), ["entropy_low"]), (dict(entropy=0.6), []), (dict(entropy=0.601), ["entropy_high"]),
    (dict(response_tokens_mean=15.0), []), (dict(response_tokens_mean=14.9), ["length_low"]), (dict(response_tokens_mean=180.0), []), (dict(response_tokens_mean=181.0), ["length_high"]),
    (dict(bad_call_rate=0.349), []), (dict(bad_call_rate=0.35), ["bad_calls"]), (dict(bad_call_rate=0.0), []),
    (dict(acc_cold=0.2, acc_guided=0.7), ["cold_gap"]), # Half is lost, and the gap grew from 0.4 to 0.5
    (dict(acc_cold=0.21, acc_guided=0.8), []), # Not quite half
    (dict(acc_cold=0.2, acc_guided=0.69), []), # The gap grew by 0.09
    (dict(acc_cold=0.0, acc_guided=0.4), []), # Both fell: feedback is not the reason
    (dict(acc_cold=0.0, acc_guided=0.8), ["cold_gap"]),
    (dict(tool_calls_mean=0.1, bad_call_rate=0.9, entropy=3.0), ["few_calls", "entropy_high", "bad_calls"]),
])
def test_limits(now, want): assert kinds(then(**now)) == want

def test_a_small_fall_of_a_small_success_is_noise():
    early = rows(4, acc_cold=.12)
    assert kinds(early + rows(3, acc_cold=.03, acc_guided=.9)) == [] # Three quarters are lost, but only 0.09
    assert kinds(early + rows(3, acc_cold=.02)) == ["cold_gap"]

def test_the_gap_is_seen_where_success_had_to_rise_first():
    rise = [dict(HEALTHY, acc_cold=x) for x in (0, 0, 0, 0, .1, .2, .6, .6, .6, .6)]
    assert kinds(rise) == []
    [a] = alarms(rise + rows(3, acc_cold=.3), SMALL)
    assert (a.name, a.value, a.reference) == ("cold_gap", .3, .6)

def test_an_alarm_says_both_numbers():
    [a] = alarms(then(tool_calls_mean=.5), SMALL)
    assert a == Alarm("few_calls", .5, 4.0, "few_calls: the policy hardly calls tools any more (tool_calls_mean 0.5, was 4)")

def test_every_kind_has_words(): assert set(WORDS) == {*BELOW, *ABOVE, "bad_calls", "cold_gap"}

# When

def test_stretches_do_not_overlap():
    bad = rows(4) + rows(2, tool_calls_mean=0.0)
    assert kinds(bad) == [] and kinds(bad + rows(1, tool_calls_mean=0.0)) == ["few_calls"]

def test_one_odd_step_is_nothing_and_two_of_three_are():
    assert kinds(rows(6) + rows(1, tool_calls_mean=0.0)) == []
    assert kinds(rows(5) + rows(2, tool_calls_mean=0.0)) == ["few_calls"]

def test_only_the_latest_steps_count(): assert kinds(rows(4) + rows(6, tool_calls_mean=0.0) + rows(3)) == []
def test_off_is_off(): assert kinds(then(tool_calls_mean=0.0), AlarmConfig(mode="off", window=3, reference=4)) == []

def test_what_is_missing_is_not_judged():
    assert kinds(then(entropy=None)) == [] and kinds(rows(4, entropy=None) + rows(3, entropy=9.0)) == []
    assert kinds(then(acc_guided=None, acc_cold=0.0)) == [] # An arm without feedback has no gap
    assert kinds([dict(step=i) for i in range(9)]) == []

def test_a_reference_of_zero_has_no_ratio(): assert kinds(rows(4, entropy=0.0) + rows(3, entropy=1.0)) == []

# Properties

NUMBER = st.none() | st.floats(0, 1e6) | st.just(float("nan"))
ROW = st.fixed_dictionaries({}, optional={k: NUMBER for k in KEYS})
CONFIG = st.builds(AlarmConfig, window=st.integers(1, 6), reference=st.integers(1, 12))

@given(ROW, st.integers(0, 40), CONFIG)
def test_a_run_that_does_not_change_never_alarms(row, n, config): assert alarms([row] * n, config) == []

@settings(max_examples=200)
@given(st.lists(ROW, max_size=30), CONFIG)
def test_any_rows_are_judged_and_every_alarm_is_finite(rs, config):
    found = alarms(rs, config)
    assert len({a.name for a in found}) == len(found) and {a.name for a in found} <= set(WORDS)
    json.dumps([[a.value, a.reference] for a in found], allow_nan=False)
    assert not {"entropy_low", "entropy_high"} <= {a.name for a in found}

@given(st.lists(st.fixed_dictionaries({k: st.integers(1, 1000).map(float) for k in ("tool_calls_mean", "entropy", "response_tokens_mean")}), min_size=7, max_size=20), st.sampled_from([.25, .5, 2.0, 64.0]))
def test_units_do_not_matter(rs, factor): assert kinds(rs) == kinds([{k: v * factor for k, v in r.items()} for r in rs])

@given(st.lists(ROW, min_size=7, max_size=20), st.randoms(use_true_random=False))
def test_the_order_within_a_stretch_does_not_matter(rs, rnd):
    head, mid, tail = rs[:4], rs[4:-3], rs[-3:]
    a = {x.name for x in alarms(rs, SMALL)} - {"cold_gap"} # Whose reference is chosen over all stretches
    rnd.shuffle(head); rnd.shuffle(tail)
    assert a == {x.name for x in alarms(head + mid + tail, SMALL)} - {"cold_gap"}

@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "demo").glob("*/metrics.jsonl")), ids=lambda p: p.parent.name)
def test_the_runs_that_ship_are_sound(path):
    real = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in real] == list(range(1, len(real) + 1)) and len(real) >= 16 and all(alarms(real[:i]) == [] for i in range(len(real) + 1))

# In an engine

def test_a_watch_notes_every_step_and_speaks_once():
    heard, found = [], []
    watch = Watch(SMALL, say=heard.append)
    for i, r in enumerate(rows(4) + rows(5, tool_calls_mean=0.0), 1):
        row = dict(r, step=i)
        assert watch(row) is None # Mode `warn` never ends a run
        found.append(row["alarms"])
    assert found == [{}] * 6 + [dict(few_calls=0.0)] * 3 # At step 6 two of the three latest steps have no calls, but 4 + 3 rows are needed
    assert heard == ["step 7: few_calls: the policy hardly calls tools any more (tool_calls_mean 0, was 4)"]

def test_a_second_kind_is_told_too():
    heard = []
    watch = Watch(SMALL, rows(4) + rows(3, tool_calls_mean=0.0), heard.append)
    watch(rows(1, tool_calls_mean=0.0)[0])
    for _ in range(3): watch(rows(1, tool_calls_mean=0.0, entropy=0.0)[0])
    assert [h.split(": ")[1] for h in heard] == ["few_calls", "entropy_low"]

def test_stop_says_why_and_how_to_go_on():
    watch = Watch(AlarmConfig(mode="stop", window=3, reference=4), rows(4) + rows(2, entropy=.001), lambda text: None)
    why = watch(rows(1, entropy=.001)[0])
    assert "collapsed: entropy_low" in why and "0.001" in why and "train.alarm.mode to warn" in why
    assert watch(rows(1)[0]) is not None and watch(rows(1)[0]) is None # Two of three sound steps, and it is over

def test_a_resumed_run_is_judged_like_an_unbroken_one():
    run = rows(4) + rows(2) + rows(3, bad_call_rate=.8)
    whole, resumed = Watch(SMALL, say=lambda t: None), Watch(SMALL, [dict(r) for r in run[:7]], lambda t: None)
    straight = [whole(r) or r["alarms"] for r in [dict(r) for r in run]]
    assert straight[7:] == [resumed(r) or r["alarms"] for r in [dict(r) for r in run[7:]]]
    assert straight[-1] == dict(bad_calls=.8)

def test_an_empty_run_is_quiet(): assert Watch(AlarmConfig())(dict(step=1)) is None
