"""BFCL: the benchmark's verdict, its gold, what feedback may tell, hostile calls, generated tasks, determinism, speed, light imports."""
import contextlib, io, json, random, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from fg_dapo.domains.bfcl import make
from fg_dapo.domains.bfcl.environment import play_bfcl
from fg_dapo.domains.bfcl.episode import MAX_CALLS, hide_secrets, leaf_values, squeezed
from fg_dapo.domains.bfcl.generated import GOAL_KINDS, generated_demonstration
from fg_dapo.domains.bfcl.package import bfcl_classes, bfcl_tools, public_rows, public_split, read_gold
from fg_dapo.env.seam import Demonstrates, Environment, Episode, Reference, ToolCall, Turn

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope="module")
def public(): return make()

@pytest.fixture(scope="module")
def made(): return make(source="generated", sizes=dict(train=120, val=20, test=120))

def all_tasks(environment, *splits):
    return [task for split in splits for task in environment.tasks(split)]

def turns_policy(turns):
    "A policy that plays given calls; a step holds at most `MAX_CALLS`, so gold's two turns of 34 calls are two steps."
    def policy(task, episode, rng):
        for calls in turns:
            for place in range(0, len(calls), MAX_CALLS):
                yield Turn(calls=tuple(ToolCall(call.name, call.arguments) for call in calls[place:place + MAX_CALLS]))
            yield Turn("Done.")
    return policy

def changed(value, rng):
    "Another value of the same type."
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + rng.choice((1, 2, 10))
    if isinstance(value, str): return value + rng.choice(("x", " 2", "_old"))
    if isinstance(value, list): return value[:-1]
    return value

def variant(kind, gold, rng):
    "Gold's calls, spoiled in one way."
    turns = [list(calls) for calls in gold]
    if kind == "no_op": return [[] for _ in turns]
    if kind == "dropped":
        calls = rng.choice([calls for calls in turns if calls])
        calls.pop(rng.randrange(len(calls)))
    if kind == "permuted":
        for calls in turns: rng.shuffle(calls)
    if kind == "wrong_argument":
        spots = [(turn, place) for turn, calls in enumerate(turns) for place, call in enumerate(calls) if call.arguments]
        turn, place = rng.choice(spots)
        call = turns[turn][place]
        name = rng.choice(sorted(call.arguments))
        turns[turn][place] = type(call)(call.name, call.arguments | {name: changed(call.arguments[name], rng)})
    if kind == "early": rng.choice(turns).append(next(call for calls in gold for call in calls))
    return turns

def package_verdict(number, name, scenario, turns):
    "The package's checkers on call strings that this test builds from gold: whole, and without the rule on empty gold."
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker as checker, multi_turn_utils as utils
    row, answer = public_rows(scenario.category)[number]
    strings = [[[call.text for call in calls]] if calls else [] for calls in turns]
    before = set(vars(utils))
    with contextlib.redirect_stdout(io.StringIO()):
        official = checker.multi_turn_checker(strings, answer["ground_truth"], row, scenario.category, name)["valid"]
    for key in set(vars(utils)) - before: del vars(utils)[key]
    silent = checker.multi_turn_irrelevance_checker(strings, answer["ground_truth"])["valid"]
    return official and silent, official

@pytest.fixture
def fresh_lists(monkeypatch):
    "The package's `post_tweet` keeps one default list for all runs and all instances; here every call gets its own."
    kind = bfcl_classes()["TwitterAPI"]
    plain = kind.post_tweet
    def post_tweet(self, content, tags=None, mentions=None): return plain(self, content, list(tags or []), list(mentions or []))
    monkeypatch.setattr(kind, "post_tweet", post_tweet)

@pytest.mark.parametrize("kind", ("gold", "no_op", "dropped", "permuted", "wrong_argument", "early"))
def test_the_verdict_is_the_packages_on_all_800_tasks(public, kind, fresh_lists):
    differ, passed = [], 0
    for task in all_tasks(public, "train", "test"):
        scenario, rng = public.scenario_of(task), random.Random(f"{kind} {task.id}")
        turns = variant(kind, scenario.gold, rng)
        outcome = play_bfcl(turns_policy(turns), public, task).outcome()
        theirs = package_verdict(int(task.id.rsplit("_", 1)[1]), f"m{kind}", scenario, turns)
        if (outcome.success, bool(outcome.metrics["official"])) != theirs: differ.append((task.id, outcome.failure, theirs))
        passed += outcome.success
        assert (outcome.score == 1.0) == outcome.success
    assert differ == []
    assert passed == dict(gold=800, no_op=0).get(kind, passed)
    if kind in ("dropped", "wrong_argument", "permuted", "early"): assert passed < 800

def test_gold_solves_all_and_silence_none(public, made):
    for environment in (public, made):
        tasks = all_tasks(environment, "train", "test")
        for name, wanted in (("oracle", 1.0), ("no_op", 0.0)):
            outcomes = [play_bfcl(environment.policies()[name], environment, task).outcome() for task in tasks]
            assert {outcome.score for outcome in outcomes} == {wanted}

def test_policies_without_knowledge_stay_under_the_floor(public, made):
    for environment in (public, made):
        tasks = all_tasks(environment, "train", "test")
        for name in ("first_tool_always", "random", "adaptive"):
            solved = sum(play_bfcl(environment.policies()[name], environment, task, 1).outcome().success for task in tasks)
            assert solved / len(tasks) <= environment.floor, name

def test_it_is_an_environment(public, made):
    episode = public.open(public.tasks("test")[0], 0)
    for environment in (public, made): assert isinstance(environment, Environment) and isinstance(environment, Reference)
    assert isinstance(episode, Episode) and isinstance(made, Demonstrates)
    for split in ("dev", ""):
        with pytest.raises(ValueError, match="there are test, train"): public.tasks(split)
    with pytest.raises(ValueError, match="no source 'x'"): make(source="x")

def test_a_scenario_stands_on_one_side_of_the_split(public):
    sides = {}
    for split in ("train", "test"):
        assert len(public.tasks(split)) == 400
        for task in public.tasks(split): sides.setdefault(task.id.rsplit("_", 1)[1], set()).add(split)
    assert len(sides) == 200 and all(len(side) == 1 for side in sides.values())
    for split in ("train", "test"):
        assert {task.slices["category"] for task in public.tasks(split)} == {"base", "miss_func", "miss_param", "long_context"}
    assert public_split(0) == public_split(0) != public_split(1)
    with_val = public_split(0, 20)
    assert sum(side == "val" for side in with_val.values()) == 20
    assert all(with_val[n] == "test" for n, side in public_split(0).items() if side == "test")

def test_withheld_tools_appear_when_their_turn_comes(public):
    seen = 0
    for task in all_tasks(public, "train", "test"):
        scenario, episode = public.scenario_of(task), public.open(task, 0)
        while not episode.done:
            names = {schema["function"]["name"] for schema in episode.tools()}
            for name, turn in scenario.withheld.items(): assert (name in names) == (episode.turn >= turn)
            seen += len(scenario.withheld)
            episode.act(Turn("I cannot."))
    assert seen > 400

# Feedback

def failing_policy(task, episode, rng):
    "Gold with calls left out, doubled, spoiled or mixed with random ones: it gets far, and it meets secrets."
    for calls in episode.scenario.gold:
        for call in calls:
            draw = rng.random()
            if draw < 0.2: continue
            arguments = {key: changed(value, rng) if rng.random() < 0.25 else value for key, value in call.arguments.items()}
            yield Turn(calls=(ToolCall(call.name, arguments),) * (2 if draw > 0.85 else 1))
        if rng.random() < 0.3: yield Turn(calls=(ToolCall(rng.choice([c.name for t in episode.scenario.gold for c in t]), {}),))
        yield Turn("Done.")

def test_5000_failures_tell_no_gold_value_that_the_user_did_not_say(public, made):
    counts = dict(public=0, generated=0)
    for environment, tries in ((public, 7), (made, 14)):
        for task in all_tasks(environment, "train", "test"):
            scenario = environment.scenario_of(task)
            said = squeezed(" ".join(scenario.messages))
            schemas = squeezed(" ".join(json.dumps(t.schema) for t in bfcl_tools().values() if t.owner in scenario.classes))
            hidden = set(environment.secrets(task))
            values = {text for calls in scenario.gold for call in calls for text in leaf_values(list(call.arguments.values())) if len(text) > 2}
            for text in values: assert text in hidden or squeezed(text) in said + schemas or squeezed(text.removesuffix(".0")) in said + schemas or not squeezed(text).strip()
            for seed in range(tries):
                episode = play_bfcl(failing_policy, environment, task, seed)
                if episode.outcome().success: continue
                counts[environment.source] += 1
                for detail in ("hint", "observed", "full"):
                    text = squeezed(environment.feedback(episode, detail))
                    assert len(text) < 20_000
                    for secret in hidden: assert squeezed(secret) not in text, (task.id, seed, detail, secret)
    assert counts["public"] >= 5000 and counts["generated"] >= 1500, counts

def test_the_full_detail_is_not_told_in_the_test_split(public, made):
    for environment in (public, made):
        for split in ("train", "test"):
            for task in environment.tasks(split)[:30]:
                episode = play_bfcl(environment.policies()["no_op"], environment, task)
                text = environment.feedback(episode, "full")
                assert ("needs these calls" in text or "needs no call" in text) == (split == "train")
                assert text.startswith("Missing calls are not told") == (split == "test")
                assert environment.feedback(play_bfcl(environment.policies()["oracle"], environment, task), "observed") is None
    with pytest.raises(ValueError, match="no detail 'all'"): made.feedback(episode, "all")

@pytest.mark.parametrize("text", ("id 12446", "ID:12446.", "[12345, 12446]", "order-12446-b", "(12446)"))
def test_a_secret_is_hidden_in_any_surrounding(text):
    assert "12446" not in hide_secrets(text, ["12446"])
    assert hide_secrets("124460", ["12446"]) == "124460"

# Hostile calls

HOSTILE = [
    ("power", dict(base=10, exponent=10**9)), ("logarithm", dict(value=2.0, base=10.0, precision=10**9)), ("multiply", dict(a="ab", b=10**9)),
    ("square_root", dict(number=2.0, precision=10**9)), ("round_number", dict(number=5, decimal_places=-10**9)), ("mean", dict(numbers=[1.0] * 100_000)),
    ("cd", dict(folder="x" * 1_000_000)), ("cd", {}), ("cd", dict(folder=None)), ("cd", dict(path="x")), ("cd", ["x"]), ("ls", dict(a={"b": 1})),
    ("__init__", {}), ("_load_scenario", dict(scenario={})), ("_current_dir", {}), ("__class__", {}), ("eval", dict(x="1")), ("os.system", dict(x="ls")),
    ("", {}), ("cd(folder='x')", {}), ("\x1b[31m", {}), ("<|im_start|>", {})]

@pytest.mark.parametrize("name,arguments", HOSTILE)
def test_a_hostile_call_is_an_error_that_changes_nothing(public, name, arguments):
    task = next(t for t in all_tasks(public, "train", "test") if {"MathAPI", "GorillaFileSystem"} <= set(public.scenario_of(t).classes))
    episode = public.open(task, 0)
    start = time.perf_counter()
    reply, = episode.act(Turn(calls=(ToolCall(name, arguments),)))
    assert time.perf_counter() - start < 1 and reply.error and len(str(reply.content)) < 1000 and len(reply.tool) <= 60
    assert play_bfcl(public.policies()["oracle"], public, task).outcome().success

def test_folders_in_circles_and_doubled_do_not_hang(public):
    task = next(t for t in public.tasks("train") if "GorillaFileSystem" in public.scenario_of(t).classes)
    episode, errors = public.open(task, 0), 0
    episode.act(Turn(calls=(ToolCall("mkdir", dict(dir_name="a")), ToolCall("cp", dict(source="a", destination="a")))))
    start = time.perf_counter()
    for number in range(18):
        calls = [ToolCall("cp", dict(source="a", destination=f"b{number}")), ToolCall("mv", dict(source=f"b{number}", destination="a")), ToolCall("find", {})]
        errors += sum(reply.error for reply in episode.act(Turn(calls=tuple(calls * 8))))
    episode.act(Turn("Done."))
    assert time.perf_counter() - start < 20 and errors > 0

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=8), c, max_size=3), max_leaves=6)

@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_arguments_are_answered(public, data):
    name = data.draw(st.sampled_from(sorted(bfcl_tools())))
    owner = bfcl_tools()[name].owner
    task = next(t for t in all_tasks(public, "train", "test") if owner in public.scenario_of(t).classes)
    keys = list(bfcl_tools()[name].properties) + ["other"]
    arguments = data.draw(st.dictionaries(st.sampled_from(keys), json_values, max_size=4))
    episode = public.open(task, 0)
    reply, = episode.act(Turn(calls=(ToolCall(name, arguments),)))
    json.dumps(reply.content)
    while not episode.done: episode.act(Turn("Done."))
    assert 0 <= episode.outcome().score <= 1
    assert public.feedback(episode, "observed")

def test_too_many_steps_or_calls_and_a_stop_end_in_failure(public):
    task = public.tasks("train")[0]
    episode = public.open(task, 0)
    replies = episode.act(Turn(calls=(ToolCall("nothing"),) * 40))
    assert len(replies) == 40 and "at most 32" in replies[-1].content["error"]
    while not episode.done: episode.act(Turn(calls=(ToolCall("", error="not JSON"),)))
    assert episode.outcome().failure == "out_of_steps" and "too many steps" in public.feedback(episode, "hint")
    with pytest.raises(ValueError, match="is over"): episode.act(Turn())
    other = public.open(task, 0)
    other.stop()
    assert other.outcome().failure == "stopped" and not other.outcome().success

def test_replies_are_cut_and_do_not_change_later(public):
    small = make(max_reply=100)
    for task in small.tasks("train")[300:340]:
        episode = play_bfcl(small.policies()["oracle"], small, task)
        assert episode.outcome().success
    task = next(t for t in public.tasks("train") if "TradingBot" in public.scenario_of(t).classes)
    episode = public.open(task, 0)
    login = ToolCall("trading_login", dict(username="a", password="b"))
    before = episode.act(Turn(calls=(login, ToolCall("get_account_info"))))[1].content
    kept = json.dumps(before)
    episode.act(Turn(calls=(ToolCall("fund_account", dict(amount=5.0)),)))
    assert json.dumps(before) == kept

@pytest.mark.parametrize("text", ("cd(folder=__import__('os'))", "a.b()", "cd(folder=cd('x'))", "1+1", "cd(", "nothing()", "cd('a', 'b')", "cd(path='x')"))
def test_a_gold_string_with_more_than_literals_is_refused(text):
    with pytest.raises(ValueError): read_gold(text)

# Generated tasks

def test_generated_tasks_hold_out_kinds_and_the_same_seed_gives_the_same(made):
    again, other = make(source="generated", sizes=dict(train=120, val=20, test=120)), make(source="generated", seed=1, sizes=dict(train=120, val=20, test=120))
    assert made.scenarios == again.scenarios and made.scenarios != other.scenarios
    held = {kind.name for kind in GOAL_KINDS.values() if kind.held_out}
    for task in made.tasks("train"): assert task.family not in held
    assert {task.family for task in made.tasks("test") if task.slices["goal"] == "held_out"} == held
    assert {task.slices["calls"] for task in made.tasks("train")} == {"1", "2", "3", "4"}
    for task in all_tasks(made, "train", "test"):
        names = {schema["function"]["name"] for schema in made.open(task, 0).tools()}
        assert len(names) == 6 and {call.name for call in made.scenario_of(task).gold[0]} <= names

def test_demonstrations_are_answered_as_shown_and_reproducible(made):
    errors, owners = 0, set()
    for seed in range(300):
        task, turns = generated_demonstration(random.Random(seed))
        assert (task, turns) == generated_demonstration(random.Random(seed))
        assert turns[-1][1] == [] and not turns[-1][0].calls and all(turn.calls for turn, _ in turns[:-1])
        errors += sum(reply.error for _, replies in turns for reply in replies)
        owners.add(task.family)
    assert errors > 20 and len(owners) >= 6

def test_episodes_are_deterministic(public, made):
    for environment in (public, made):
        for name, policy in environment.policies().items():
            for task in environment.tasks("test")[::40]:
                first, second = play_bfcl(policy, environment, task, 3), play_bfcl(policy, environment, task, 3)
                assert (first.outcome(), first.facts, first.verdicts) == (second.outcome(), second.facts, second.verdicts)

def test_500_oracle_episodes_a_second(public):
    tasks = all_tasks(public, "train", "test")
    for task in tasks: public.open(task, 0)
    start = time.process_time()
    for task in tasks: play_bfcl(public.policies()["oracle"], public, task)
    assert len(tasks) / (time.process_time() - start) > 500

def test_nothing_of_the_package_is_imported_before_it_is_needed():
    code = "import sys, fg_dapo, fg_dapo.domains.bfcl, fg_dapo.domains.bfcl.environment; print([m for m in sys.modules if m.startswith(('bfcl_eval', 'mpmath'))])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"

def test_without_the_package_the_error_names_the_command(monkeypatch):
    import fg_dapo.domains.bfcl.package as package
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps bfcl-eval"): make()
