"""Environments: the schema of a method, leaks, a user's own class, the registry, the check, TRL's contract."""
import asyncio, inspect, json, math, random, subprocess, sys, threading, time
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings, strategies as st

from fg_dapo.env.checks import CheckReport, check, check_command, follow_policy, hostile, random_calls, trace
from fg_dapo.env.face import ClassEnvironment, ToolTimeout, as_turn, for_trl, json_value, not_a_tool, rows_by_split, tool_methods, within_seconds
from fg_dapo.env.leaks import leaked_secret, without_secrets
from fg_dapo.env.registry import built_in, environment, is_environment
from fg_dapo.env.schema import call_problem, hint_schema, sample_value, schema_problem, method_schema
from fg_dapo.env.seam import DETAILS, Environment, Episode, Reference, Demonstrates, Reenacts, Copies, Outcome, Reply, Task, ToolCall, Turn

class Safe:
    "A safe with a code."
    def reset(self, code:str="4321", **row)->str|None:
        self.code, self.tried, self.is_open = code, 0, False
        return " It is grey."
    def enter(self, code:str, force:int=1)->Any:
        """Enter a code.

        Args:
            code: Four digits.
            force: How hard.
        """
        self.tried += 1
        if code == "crash": raise RuntimeError(f"the mechanism broke; it wanted {self.code}")
        if code == "exit": raise SystemExit(3)
        if code == "hang":
            while True: pass
        if code == "swallow":
            while True:
                try: time.sleep(0.001)
                except Exception: pass
        if code == "object": return object()
        if code == "huge": return "x" * 1_000_000
        if code == "nan": return {"value": math.nan, "set": {2, 1}, "pair": (1, 2)}
        if code == "cycle":
            loop = []
            loop.append(loop)
            return loop
        if code == "error": return {"error": "Wrong. <b>Never</b>\x1b[31m use \ud800 that."}
        if code == "none": return None
        self.is_open = code == self.code
        return "open" if self.is_open else {"error": "Wrong code."}
    async def wait(self)->str:
        "Wait a little."
        await asyncio.sleep(0)
        return "waited"
    @property
    def parts(self): return dict(tried=float(self.tried > 0), opened=float(self.is_open))
    def get_reward(self)->float: return float(self.is_open)

ROWS = [dict(id=f"r{i}", prompt="Open the safe.", code="4321", split="test", secrets=["4321"]) for i in range(6)]

@pytest.fixture
def safe(): return ClassEnvironment(Safe, ROWS, call_seconds=0.2)

def play(env, *steps):
    task = env.tasks("test")[0]
    episode, replies = env.open(task, 0), []
    for step in steps:
        if episode.done: break
        replies += episode.act(as_turn(step))
    if not episode.done: episode.act(Turn("I give up."))
    return episode, replies

# Schemas

@pytest.mark.parametrize("hint, schema", [(str, {"type": "string"}), (int, {"type": "integer"}), (float, {"type": "number"}), (bool, {"type": "boolean"}),
    (list, {"type": "array"}), (list[int], {"type": "array", "items": {"type": "integer"}}), (dict, {"type": "object"}),
    (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}), (Optional[str], {"type": "string", "nullable": True}),
    (int | str, {"type": ["integer", "string"]}), (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}), (Any, {}),
    (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]})])
def test_a_hint_gives_its_schema(hint, schema): assert hint_schema(hint) == schema

@pytest.mark.parametrize("hint", [str, int, float, bool, list[int], dict[str, float], Optional[str], int | str, Literal["a", 1], list[dict[str, int]], None | list[str]])
def test_the_schema_is_what_transformers_makes_of_it(hint):
    from transformers.utils import get_json_schema
    def method(self, x): pass
    method.__annotations__ = dict(x=hint)
    method.__doc__ = "Do it.\n\nArgs:\n    x: What."
    theirs, ours = get_json_schema(method)["function"]["parameters"]["properties"]["x"], method_schema(method)["function"]["parameters"]["properties"]["x"]
    if isinstance(theirs.get("type"), list): theirs["type"], ours["type"] = sorted(theirs["type"]), sorted(ours["type"])
    assert ours == theirs

def test_what_a_tool_lacks_is_named():
    class Bad:
        def no_doc(self, x:int): pass
        def no_hint(self, x): "Do."
        def no_text(self, x:int): "Do."
        def stars(self, *xs:int): "Do."
        def odd(self, x:set): # A set
            """Do.

            Args:
                x: A set.
            """
    for name, part in [("no_doc", "no docstring"), ("no_hint", "no type hint"), ("no_text", "is not described"), ("stars", "named parameters only"), ("odd", "no JSON form")]:
        with pytest.raises(ValueError, match=part): method_schema(getattr(Bad, name))

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=8)
schemas = st.recursive(st.sampled_from([{"type": t} for t in ("string", "integer", "number", "boolean", "null")] + [{"enum": ["a", 1, True]}, {}]),
    lambda s: st.builds(lambda i: {"type": "array", "items": i, "minItems": 1}, s) | st.builds(lambda a, b: {"anyOf": [a, b]}, s, s) |
        st.builds(lambda a: {"type": "object", "properties": {"k": a}, "required": ["k"]}, s), max_leaves=5)

@settings(max_examples=200, deadline=None)
@given(schemas, json_values, st.integers(0, 2**32))
def test_the_verdict_on_a_value_is_that_of_jsonschema_and_made_up_values_fit(schema, value, seed):
    import jsonschema
    closed = json.loads(json.dumps(schema).replace('"type": "object"', '"type": "object", "additionalProperties": false'))
    try: finite = json.dumps(value, allow_nan=False) is not None
    except ValueError: finite = False
    if finite: assert (schema_problem(value, closed) is None) == jsonschema.Draft202012Validator(closed).is_valid(value)
    else: schema_problem(value, closed)
    assert schema_problem(sample_value(schema, random.Random(seed)), schema) is None

def test_a_call_is_held_against_what_is_on_offer():
    tools = [method_schema(Safe.enter)]
    good = [ToolCall("enter", dict(code="1")), ToolCall("enter", dict(code="1", force=2.0))]
    bad = [ToolCall("entr", dict(code="1")), ToolCall("enter", {}), ToolCall("enter", dict(code=1)), ToolCall("enter", dict(code="1", x=1)), ToolCall("enter", None), ToolCall("enter", dict(code="1", force=True)),
        ToolCall("enter", dict(code="1", force=math.nan)), ToolCall("reset", {}), ToolCall("__init__", {}), ToolCall("", {}, error="not JSON")]
    assert [call_problem(c, tools) for c in good] == [None, None] and all(call_problem(c, tools) for c in bad)
    assert "enter" in call_problem(bad[0], tools) and "1 (" not in call_problem(bad[2], tools)

# Leaks

def disguises(value):
    "A value as somebody writes it who wants to get it past a filter."
    import base64
    words = dict(zip("0123456789", "zero one two three four five six seven eight nine".split()))
    yield from (value, value.upper(), " ".join(value), "-".join(value), ".".join(value), "_".join(value), "\u200b".join(value), "\u2060".join(value), "\n".join(value), ", ".join(value), "/".join(value))
    yield "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in value)
    yield " ".join(words.get(c, c) for c in value)
    yield "-".join(words.get(c, c) for c in value)
    yield base64.b64encode(value.encode()).decode()
    yield base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")

@pytest.mark.parametrize("value", ["4321", "83-4471", "tangerine", "K7-44-21", "Ann Lee", "91"])
@pytest.mark.parametrize("frame", ["{}", "The code is {}.", "Use ({}) now", "a\n{}\nb"])
def test_a_disguised_value_is_a_leak(value, frame):
    for text in disguises(value): assert leaked_secret(frame.format(text), [value]) == value, text

def test_other_texts_are_no_leaks():
    for text in ["The code is 4322.", "Pull 4 levers, then 3.", "14321a is no word", "", "Red lever first."]: assert leaked_secret(text, ["red", "991"] if "Red" not in text else ["blue"]) is None
    assert leaked_secret("covered 1999", ["red", "19"]) is None and leaked_secret("anything", ["", " "]) is None

def test_sentences_with_secrets_are_dropped():
    assert without_secrets("The lid is shut. It wants 4 3 2 1! Look first.", ["4321"]) == "The lid is shut. Look first."
    assert without_secrets("four.\nthree.\ntwo.\none.", ["4321"]) == ""

# A user's own class

def test_a_class_conforms_to_the_seam(safe):
    episode, _ = play(safe, ("enter", dict(code="4321")))
    assert isinstance(safe, Environment) and isinstance(episode, Episode) and isinstance(episode, Copies)
    assert not any(isinstance(safe, p) for p in (Reference, Demonstrates, Reenacts))
    toy = environment("toy")
    assert all(isinstance(toy, p) for p in (Environment, Reference, Demonstrates, Reenacts))
    assert episode.outcome() == Outcome(True, 1.0, "stopped", None, dict(reward=1.0, turns=2.0, calls=1.0, errors=0.0))

def test_the_prompt_is_the_row_and_what_reset_says():
    assert ClassEnvironment(Safe, ROWS).tasks("test")[0].prompt == "Open the safe. It is grey."
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="Open.")]
    task = ClassEnvironment(Safe, [dict(ROWS[0], prompt=messages)]).tasks("test")[0]
    assert task.prompt == [messages[0], dict(role="user", content="Open. It is grey.")] and messages[1]["content"] == "Open."

@pytest.mark.parametrize("code, said", [("crash", "mechanism broke"), ("exit", "3"), ("object", "no JSON form"), ("cycle", "nested more than 40"), ("error", "Wrong"), ("1", "Wrong code")])
def test_what_goes_wrong_in_a_tool_is_an_observation(safe, code, said):
    episode, replies = play(safe, ("enter", dict(code=code)), ("enter", dict(code="4321")))
    assert replies[0].error and said in json.dumps(replies[0].content) and "0x" not in json.dumps(replies[0].content)
    assert episode.outcome().success

@pytest.mark.parametrize("code", ["hang", "swallow"])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_tool_that_hangs_ends_the_episode_and_not_the_run(safe, code, threaded):
    out = []
    def run(): out.append(play(safe, ("enter", dict(code=code)))[0])
    start = time.perf_counter()
    if threaded and code == "swallow":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else: run()
    assert time.perf_counter() - start < 3 and out[0].outcome().failure == "hung" and not out[0].outcome().success
    assert safe.feedback(out[0], "observed")

def test_odd_returns_are_made_json_and_huge_ones_cut(safe):
    _, replies = play(safe, ("enter", dict(code="nan")), ("enter", dict(code="huge")), ("enter", dict(code="none")), ("wait", {}))
    assert replies[0].content == dict(value="nan", set=[1, 2], pair=[1, 2]) and replies[2].content is None and replies[3].content == "waited"
    assert len(replies[1].content) <= 4000 and "cut: 1000000 characters" in replies[1].content
    json.dumps([r.content for r in replies], allow_nan=False).encode()

def test_async_tools_work_inside_a_running_loop(safe):
    async def inside(): return play(safe, ("wait", {}))[1]
    assert asyncio.run(inside())[0].content == "waited"

def test_a_reward_may_be_async_as_in_trl():
    class Later(Safe):
        async def get_reward(self): return float(self.is_open)
    assert play(ClassEnvironment(Later, ROWS), ("enter", dict(code="4321")))[0].outcome().success

def test_arguments_are_the_tools_own(safe):
    class Keeps(Safe):
        def keep(self, xs:list[int])->int:
            """Keep.

            Args:
                xs: Numbers.
            """
            xs.append(1)
            return len(xs)
    given = [1]
    play(ClassEnvironment(Keeps, ROWS), ("keep", dict(xs=given)))
    assert given == [1]

def test_limits_end_an_episode():
    env = ClassEnvironment(Safe, ROWS, max_turns=2, max_calls=3)
    episode, _ = play(env, ("wait", {}), ("wait", {}), ("wait", {}))
    assert episode.outcome().ended == "out_of_turns"
    episode, _ = play(env, [("wait", {})] * 5)
    assert episode.outcome().ended == "out_of_calls" and episode.calls == 3
    episode = env.open(env.tasks("test")[0], 0)
    episode.stop()
    assert episode.outcome().ended == "out_of_length"
    with pytest.raises(RuntimeError, match="is over"): episode.act(Turn("x"))

@pytest.mark.parametrize("reward", [math.nan, math.inf, "no", None, -3, 7])
def test_a_bad_reward_is_recorded_and_no_success_unless_it_is_a_number(reward):
    class Odd(Safe):
        def get_reward(self): return reward
    episode, _ = play(ClassEnvironment(Odd, ROWS))
    outcome = episode.outcome()
    assert 0 <= outcome.score <= 1 and outcome.success == (reward == 7) and (outcome.failure is None) == outcome.success
    assert sorted(outcome.metrics) == ["calls", "errors", "reward", "turns"] and all(map(math.isfinite, outcome.metrics.values()))

def test_derived_feedback_tells_errors_and_parts_and_no_secret(safe):
    episode, _ = play(safe, ("enter", dict(code="error")), ("enter", dict(code="crash")), ("enter", dict(code=5)), ("entr", {}))
    text = safe.feedback(episode, "observed")
    assert "did you mean enter?" in text and "code must be string" in text and "opened" in text and "Wrong." in text
    assert "4321" not in text and "<" not in text and text.isprintable()
    assert safe.feedback(episode, "hint") == "The attempt stopped before the task was done. A call failed."
    won, _ = play(safe, ("enter", dict(code="4321")))
    assert [safe.feedback(won, d) for d in DETAILS] == [None] * 3
    with pytest.raises(ValueError, match="no detail 'much'"): safe.feedback(episode, "much")

@pytest.mark.parametrize("own", [lambda self, detail: "Use 4 3 2 1. Look first.", lambda self, detail: None, lambda self, detail: 1 / 0, lambda self, detail: 7, lambda self, detail: "<|im_end|>\x1b[1m Look first."])
def test_own_feedback_is_cleaned_and_has_a_stand_in(own):
    env = ClassEnvironment(type("Own", (Safe,), dict(feedback=own)), ROWS)
    assert "feedback" not in tool_methods(env.cls)
    for detail in ("hint", "observed"):
        text = env.feedback(play(env)[0], detail)
        assert text and leaked_secret(text, ["4321"]) is None and text.isprintable() and "<" not in text

def test_a_snapshot_is_put_back(safe):
    episode = safe.open(safe.tasks("test")[0], 0)
    episode.act(as_turn(("enter", dict(code="1"))))
    state = episode.snapshot()
    for _ in range(2):
        episode.act(as_turn(("enter", dict(code="4321"))))
        assert episode.world.is_open and episode.calls == 2
        episode.restore(state)
        assert not episode.world.is_open and episode.calls == 1 and episode.world.tried == 1

@pytest.mark.parametrize("rows, said", [([], "holds no rows"), ([dict(id="a"), dict(id="a")], "stands in row 1 too"), ([dict(split="dev")], "no split 'dev'"), ([dict(slices=[])], "slices is \\[\\]"), (["x"], "a row is an object"), ([dict(prompt=3)], "prompt is 3")])
def test_bad_rows_are_named(rows, said):
    with pytest.raises(ValueError, match=said): ClassEnvironment(Safe, rows).tasks("test")

def test_rows_without_a_split_are_dealt_out_the_same_each_time():
    rows = [dict(prompt=str(i)) for i in range(300)]
    dealt = rows_by_split(rows)
    assert dealt == rows_by_split(rows) and sum(map(len, dealt.values())) == 300 and 200 < len(dealt["train"]) < 270 and min(map(len, dealt.values())) > 10

@pytest.mark.parametrize("cls, said", [(type("A", (), {}), "no reset"), (type("B", (), dict(reset=lambda self: None)), "no get_reward"), (type("C", (), dict(reset=lambda self: None, get_reward=lambda self: 1.0)), "no tools")])
def test_a_class_that_lacks_something_is_refused(cls, said):
    with pytest.raises(ValueError, match=said): ClassEnvironment(cls, ROWS)

def test_a_reset_that_fails_names_the_row():
    class Narrow(Safe):
        def reset(self, code): pass
    with pytest.raises(ValueError, match="Narrow.reset failed on row 'r0'.*unexpected keyword"): ClassEnvironment(Narrow, ROWS).tasks("test")
    with pytest.raises(ValueError, match="no option 'max_turn'"): ClassEnvironment(Safe, ROWS, max_turn=3)
    with pytest.raises(ValueError, match="no split 'dev'"): ClassEnvironment(Safe, ROWS).tasks("dev")

# The registry

@pytest.mark.parametrize("name, said", [("tooy", "did you mean 'toy'"), ("TOY", "did you mean 'toy'"), ("", "name is text"), (None, "name is text"), ("zzzzzz", "there are"), ("json:Dumper", "no 'Dumper'"), ("no_such_mod:X", "no module"), (":X", "module:Class"), ("x.py:Y", "no file 'x.py'")])
def test_a_wrong_name_is_named_with_the_nearest(name, said):
    with pytest.raises(ValueError, match=said): environment(name)

def test_a_domain_is_a_folder_and_nothing_else():
    assert "toy" in built_in() and is_environment(environment("toy", seed=3))
    root = Path(__file__).resolve().parents[1] / "fg_dapo"
    named = [p for p in root.rglob("*.py") if "domains" not in p.parts and p.name != "_modidx.py" and ("domains.toy" in p.read_text() or '"toy"' in p.read_text())]
    assert named == []

def test_a_class_of_ones_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine_env.py").write_text("class Two:\n    def reset(self, **row): self.n = 0\n    def add(self)->int:\n        'Add one.'\n        self.n += 1\n        return self.n\n    def get_reward(self): return float(self.n == 2)\ndef makes(): return 3\n")
    (tmp_path / "r.jsonl").write_text('{"prompt": "Count to two.", "split": "test"}\n')
    monkeypatch.chdir(tmp_path)
    env = environment("mine_env:Two", rows="r.jsonl")
    assert env.name == "Two" and env.tasks("test")[0].prompt == "Count to two."
    for spec, said in [("mine_env:Tow", "did you mean 'Two'"), ("mine_nev:Two", "did you mean 'mine_env'"), ("mine_env:makes", "which is no Environment")]:
        with pytest.raises(ValueError, match=said): environment(spec)
    with pytest.raises(ValueError, match="no file 'q.jsonl'"): environment("mine_env:Two", rows="q.jsonl").tasks("test")

# The check

class Cheap(Safe):
    "Opens at every code."
    def enter(self, code:str)->str:
        """Enter a code.

        Args:
            code: Four digits.
        """
        self.is_open = True
        return "open"

class Shared(Safe):
    "Keeps state outside the object."
    count = 0
    def wait(self)->str:
        "Wait."
        Shared.count += 1
        return f"waited {Shared.count}"

def findings(env, **kw): return {f.name: f.holds for f in check(env, "test", feedbacks=40, **kw).findings}

def test_the_check_finds_a_hole_and_shared_state_and_a_leak():
    assert findings(ClassEnvironment(Cheap, ROWS))["policies without knowledge"] is False
    assert findings(ClassEnvironment(Shared, ROWS))["determinism"] is False
    class Leaks(ClassEnvironment):
        def feedback(self, episode, detail): return None if episode.outcome().success else "It is 4-3-2-1."
    found = findings(Leaks(Safe, ROWS))
    assert found["leaks at observed"] is False and found["leaks at hint"] is False and found["leaks at full"] is None

class Wrapped:
    "An environment with one thing changed."
    def __init__(self, inner, **changed):
        self.inner = inner
        vars(self).update(changed)
    def __getattr__(self, name): return getattr(self.inner, name)

def test_the_check_finds_a_crash_bad_outcomes_and_bad_tasks(safe):
    class Crashes:
        done = False
        def tools(self): return [method_schema(Safe.enter)]
        def act(self, turn): raise KeyError("boom")
        def stop(self): pass
        def outcome(self): pass
    report = check(Wrapped(safe, name="x", version="1", floor=0.1, open=lambda task, seed: Crashes()), "test", feedbacks=5)
    assert not report.ok and any("boom" in f.text for f in report.findings)
    empty = check(Wrapped(safe, name="x", version="1", tasks=lambda split: []), "test")
    assert not empty.ok and "there are none" in empty.findings[0].text
    text = check(Wrapped(safe, feedback=lambda e, d: "<b>x</b>"), "test", feedbacks=5)
    assert {f.name: f.holds for f in text.findings}["feedback texts"] is False

def test_an_oracle_that_fails_is_found():
    env = environment("toy")
    class Wrong(env.cls):
        @classmethod
        def policies(cls): return dict(oracle=lambda prompt, world, rng: iter(()) if False else (x for x in ()))
    assert findings(ClassEnvironment(Wrong))["oracle"] is False

def test_the_command_prints_and_gives_a_code(capsys):
    assert check_command("toy", "test", n=8, feedbacks=50) == 0
    out = capsys.readouterr().out
    assert "oracle" in out and "100.0%" in out and "leaks at observed" in out
    assert check_command("tooy") == 2 and "did you mean 'toy'?" in " ".join(capsys.readouterr().out.split())
    assert check_command("toy", "dev") == 2 and "no split 'dev'" in capsys.readouterr().out

@pytest.mark.parametrize("seed", range(40))
def test_a_hostile_model_neither_crashes_nor_wins(safe, seed):
    for env in (safe, environment("toy")):
        played = follow_policy(env, hostile, env.tasks("test")[seed % 6], seed)
        assert not played.outcome.success
        json.dumps([r.content for heard in played.replies for r in heard], allow_nan=False).encode()
        for detail in DETAILS: assert env.feedback(played.episode, detail).isprintable()

# TRL's contract

class TRLContract:
    "What GRPOTrainer of TRL 1.16 does with `environment_factory`, and nothing else: `__init__`, `_generate_and_score_completions`, `_tool_call_loop`."
    def __init__(self, factory):
        from transformers.utils import get_json_schema
        self.factory, instance = factory, factory()
        members = inspect.getmembers(type(instance), predicate=inspect.isfunction)
        names = [name for name, _ in members]
        if "reset" not in names: raise ValueError("must define a callable `reset`")
        if "get_reward" not in names: raise ValueError("No reward source provided")
        self.tools = [name for name in names if name not in ("reset", "get_reward") and not name.startswith("_")]
        self.schemas = [get_json_schema(getattr(instance, name)) for name in self.tools]
        self.instance = instance
    def rollout(self, row, calls):
        "One instance is reset again and again, as in the pool of the trainer."
        prompt = row.get("prompt", [dict(role="user", content="")])
        observation = self.instance.reset(**row)
        if observation is not None: prompt = prompt[:-1] + [dict(prompt[-1], content=prompt[-1]["content"] + observation)]
        messages = list(prompt)
        for name, arguments in calls:
            try: result = getattr(self.instance, name)(**arguments) if name in self.tools else {"error": f"Unknown tool {name}"}
            except Exception as e: result = {"error": str(e)}
            messages.append(dict(role="tool", name=name, content=str(result)))
        return messages, float(self.instance.get_reward())

def contract_rows(env): return [dict(env.row_of(task), prompt=[dict(role="user", content=task.prompt)]) for task in env.tasks("test")]

def test_the_toy_goes_into_trl_unchanged():
    env = environment("toy")
    trl = TRLContract(env.cls)
    assert trl.tools == ["look", "pull"] == tool_methods(env.cls)
    ours = [{**s, "function": {k: v for k, v in s["function"].items() if k != "return"}} for s in trl.schemas]
    assert ours == env.schemas
    for row in contract_rows(env)[:5]:
        for calls in ([("pull", dict(lever=lever)) for lever in row["order"]], [("pull", dict(lever="left"))] * 2, [("look", {})], []):
            messages, reward = trl.rollout(row, calls)
            episode = env.open(env.tasks("test")[0], 0)
            episode = env.open(next(t for t in env.tasks("test") if t.id == row["id"]), 0)
            for call in calls:
                if not episode.done: episode.act(as_turn(call))
            if not episode.done: episode.act(Turn("done"))
            assert reward == episode.outcome().score

def test_any_class_is_made_ready_for_trl():
    class Documented(Safe):
        def knock(self,
            times:int, # How often
        )->str:
            "Knock."
            return "knock" * times
        def feedback(self, detail:str): return "Try again."
    with pytest.raises(Exception): TRLContract(Documented)
    trl = TRLContract(for_trl(Documented))
    assert trl.tools == ["enter", "knock", "wait"]
    messages, reward = trl.rollout(dict(prompt=[dict(role="user", content="Open.")], code="77"), [("knock", dict(times=2)), ("enter", dict(code="77"))])
    assert reward == 1.0 and messages[0]["content"] == "Open. It is grey." and messages[1]["content"] == "knockknock" and trl.instance.feedback("hint") == "Try again."

# The verifiers package

STUB = '''
"""What the exported package uses of verifiers 0.4: names, hooks, and the base class's own `score`."""
import inspect
from typing import Any, Generic, TypeVar
from pydantic import BaseModel, ConfigDict

class State(BaseModel): pass
class TaskData(BaseModel):
    model_config = ConfigDict(frozen=True)
    id: str | None = None
    prompt: Any = None
class ToolsetConfig(BaseModel): pass
class TaskConfig(BaseModel): pass
class TasksetConfig(BaseModel):
    task: TaskConfig = TaskConfig()
A, B, C = TypeVar("A"), TypeVar("B"), TypeVar("C")

def reward(fn): fn.reward = True; return fn
def metric(fn): fn.metric = True; return fn

class Task(Generic[A, B]):
    def __init__(self, data, config=None): self.data, self.config = data, config
    @classmethod
    def toolsets(cls, config): return []
    async def score(self, trace, runtime=None):
        for kind, place in (("reward", trace.rewards), ("metric", trace.metrics)):
            for name in dir(type(self)):
                if hasattr(getattr(type(self), name), kind): place[name] = await getattr(self, name)(trace)

class Taskset(Generic[A, B]):
    def __init__(self, config): self.config = config
    def __iter__(self): return iter(self.load())

class Toolset(Generic[A, B]):
    def __init__(self, config): self.config, self.state = config, self.__orig_bases__[0].__args__[1]()
    def _with_state(self, fn):
        def wrapper(*args, **kwargs): return fn(*args, **kwargs)
        wrapper.__signature__, wrapper.__name__, wrapper.__doc__ = inspect.signature(fn), fn.__name__, fn.__doc__
        return wrapper
'''

def test_the_exported_package_plays_and_scores(tmp_path, monkeypatch):
    from fg_dapo.env.export import export_env
    (tmp_path / "verifiers").mkdir()
    (tmp_path / "verifiers" / "__init__.py").write_text("")
    (tmp_path / "verifiers" / "v1.py").write_text(STUB)
    out = export_env("toy", tmp_path / "package", seed=4)
    for path in (tmp_path, out): monkeypatch.syspath_prepend(str(path))
    for name in ("verifiers", "verifiers.v1", "fg_dapo_toy", "fg_dapo_toy.taskset"): monkeypatch.delitem(sys.modules, name, raising=False)
    import importlib
    from types import SimpleNamespace
    package = importlib.import_module("fg_dapo_toy")
    module, ours = importlib.import_module("fg_dapo_toy.taskset"), environment("toy", seed=4)
    tasks = list(package.EnvTaskset(module.EnvConfig(split="test")))
    assert [t.data.prompt for t in tasks] == [t.prompt for t in ours.tasks("test")]
    for task, mine in list(zip(tasks, ours.tasks("test")))[:6]:
        order = ours.row_of(mine)["order"]
        for levers in (order, order[:1], []):
            toolset, tools = module.EnvTask.toolsets(task.config)[0], {}
            asyncio.run(toolset.setup_task(task.data))
            toolset.register(SimpleNamespace(add_tool=lambda fn, name, description: tools.update({name: fn})))
            assert sorted(tools) == ["look", "pull"] and list(inspect.signature(tools["pull"]).parameters) == ["lever"]
            for lever in levers: tools["pull"](lever=lever)
            trace = SimpleNamespace(state=toolset.state, rewards={}, metrics={})
            asyncio.run(task.score(trace))
            expected = 1.0 if len(levers) == 3 else 0.5 * len(levers) / 3
            assert trace.rewards == dict(partial_credit=expected) and trace.metrics == dict(success=float(len(levers) == 3))
    for name in ("verifiers", "verifiers.v1", "fg_dapo_toy", "fg_dapo_toy.taskset"): sys.modules.pop(name, None)

def test_a_new_environment_passes_its_check(tmp_path):
    from fg_dapo.env.export import new_env
    module, rows = new_env("MyDoors", tmp_path)
    assert check(environment(f"{module}:MyDoors", rows=str(rows)), "train", feedbacks=50).ok
    with pytest.raises(ValueError, match="is there already"): new_env("MyDoors", tmp_path)
    with pytest.raises(ValueError, match="no name for a class"): new_env("My Doors", tmp_path)
