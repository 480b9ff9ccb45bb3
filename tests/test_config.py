"""Settings: what is shipped is valid, what is wrong is refused with the key and the way out."""
import os, subprocess, sys, time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from fg_dapo.config import ConfigError, RunConfig, check_config, conflicts, dump, keys, load_arms, load_config, merge, parse_override, read_yaml, _yaml_text

CONFIGS = Path(__file__).resolve().parent.parent / "experiments" / "configs"
KEYS = keys()
LEAVES = sorted(KEYS)

def value(config, key):
    for k in key.split("."): config = getattr(config, k)
    return config

def errors(*overrides, path=None):
    with pytest.raises(ConfigError) as e: load_config(path, overrides)
    return e.value.errors

# What is shipped

@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tiny_*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_file_loads_and_carries_its_name(path):
    assert load_config(path).arm == path.stem.removeprefix("tiny_")

def test_the_arms_of_the_demo_are_those_of_the_single_files():
    arms = load_arms(CONFIGS / "demo.yaml")
    assert list(arms) == ["dapo", "dapo_replay", "fg_plan", "fg_replay"]
    for name, c in arms.items(): assert load_config(CONFIGS / f"tiny_{name}.yaml").algorithm == c.algorithm

def test_arms_differ_in_feedback_transfer_and_groups_only():
    arms = load_arms(CONFIGS / "demo.yaml")
    kinds = {n: (c.algorithm.feedback_guidance.enable, c.algorithm.transfer.mode) for n, c in arms.items()}
    assert kinds == dict(dapo=(False, "none"), dapo_replay=(False, "replay"), fg_plan=(True, "none"), fg_replay=(True, "replay"))
    ours = {"arm", "algorithm.feedback_guidance.enable", "algorithm.transfer.mode"}
    groups = {"train.steps", "train.tasks_per_step", "train.eval_every", *(f"algorithm.feedback_guidance.{k}" for k in ("start_rollout", "wave_sizes", "stop_after_successes"))}
    for key in set(KEYS) - ours - groups: assert len({str(value(c, key)) for c in arms.values()}) == 1, key
    for key in groups: assert str(value(arms["dapo_replay"], key)) == str(value(arms["fg_replay"], key)), key # The control shares the groups too
    rollouts = {n: c.train.steps * c.train.tasks_per_step * c.train.rollouts for n, c in arms.items()}
    assert rollouts["dapo"] >= 5000 and rollouts["dapo_replay"] >= rollouts["fg_replay"]

def test_every_setting_has_a_description():
    assert all(KEYS.values()) and len(KEYS) > 40

def test_defaults_have_no_conflict():
    assert conflicts(RunConfig()) == [] and load_config() == RunConfig()

# Round trips

VALUES = dict(seed=st.integers(0, 10**6), arm=st.from_regex(r"\A[a-z0-9_-]{1,12}\Z"),
    **{"algorithm.lr": st.floats(1e-8, 1), "algorithm.clip_low": st.floats(.01, .99), "train.steps": st.integers(1, 10**6), "train.rollouts": st.integers(6, 64),
       "algorithm.transfer.mode": st.sampled_from(["none", "replay"]), "algorithm.feedback_guidance.wave_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=4),
       "algorithm.feedback_guidance.stop_after_successes": st.none() | st.integers(1, 8), "data.shuffle": st.booleans(), "policy.checkpoint": st.text("abc/#:' {}[]0-", min_size=1, max_size=12)})

@given(st.fixed_dictionaries({}, optional=VALUES), st.booleans())
@settings(deadline=None, max_examples=60)
def test_dump_reads_back(tmp_path_factory, chosen, comments):
    raw = {}
    for k, v in chosen.items():
        for part in reversed(k.split(".")): v = {part: v}
        raw = merge(raw, v)
    config = check_config(raw)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump(config, comments))
    assert load_config(path) == config
    for k, v in chosen.items(): assert value(config, k) == (tuple(v) if isinstance(v, list) else v)

def test_overrides_win_over_the_file_and_keep_the_rest(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {steps: 5, rollouts: 6}\nlimits:\n")
    c = load_config(tmp_path / "c.yaml", ["train.steps=7", "algorithm.lr=2e-4", "train.steps=9"])
    assert (c.train.steps, c.train.rollouts, c.algorithm.lr) == (9, 6, 2e-4)

def test_merge_leaves_its_arguments_alone():
    a, b = dict(x=dict(y=1)), dict(x=dict(z=2))
    assert merge(a, b) == dict(x=dict(y=1, z=2)) and a == dict(x=dict(y=1)) and b == dict(x=dict(z=2))

# Refusals

@pytest.mark.parametrize("key", LEAVES)
@pytest.mark.parametrize("bad", ["[[1], {a: b}]", "{a: 1}", "-1.5e9", ".nan", ""])
def test_a_value_of_the_wrong_kind_is_refused_by_name(key, bad):
    free_text = key in ("data.folder", "policy.checkpoint", "arm")
    if bad == "" and key in ("train.threads", "algorithm.feedback_guidance.stop_after_successes", "algorithm.transfer.passes", "algorithm.feedback_guidance.llm.cache"): return # Empty is null, which they take
    found = errors(f"{key}={bad}")
    assert any(key in e for e in found) and len(found) < 8, (found, free_text)

@given(st.sampled_from(LEAVES), st.data())
@settings(deadline=None, max_examples=150)
def test_a_misspelt_key_is_answered_with_the_key_that_was_meant(key, data):
    head, _, last = key.rpartition(".")
    i = data.draw(st.integers(1, len(last) - 1))
    typo = last[:i - 1] + last[i] + last[i - 1] + last[i + 1:] # Two letters swapped
    full = f"{head}.{typo}" if head else typo
    if full in KEYS: return
    found = errors(f"{full}=1")
    assert len(found) == 1 and f"unknown key {full!r}; the nearest is {key!r}" in found[0]

@pytest.mark.parametrize("key", LEAVES)
def test_a_key_in_the_wrong_section_is_found(key):
    last = key.rpartition(".")[2]
    if "." not in key: return
    meant = {k for k in LEAVES if k.endswith(f".{last}") or k == last}
    found = errors(f"{last}=1") if last not in KEYS and last not in RunConfig.model_fields else []
    if found: assert any(f"the nearest is {m!r}" in found[0] for m in meant)

def test_all_errors_come_at_once():
    found = errors("train.rollouts=1", "nonsense", "algorithm.clip_hihg=1", "seed=-1", "algorithm.pg_weight=0", "algorithm.transfer.mode=none", "engine=verl", "hardware.nodes=2")
    text = "\n".join(found)
    for part in ("train.rollouts", "'nonsense' is not of the form", "'algorithm.clip_high'", "seed", "nothing is trained", "set nodes to 1"): assert part in text
    assert len(found) == 6

def test_an_error_names_the_override_or_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: -1\n")
    found = errors("train.steps=0", path=tmp_path / "c.yaml")
    assert sorted(e.partition(":")[0] for e in found) == sorted([str(tmp_path / "c.yaml"), "override 'train.steps=0'"])

@pytest.mark.parametrize("override, words", [
    ("algorithm.feedback_guidance.use_llm_enhancement=yes please", "boolean"),
    ("algorithm.feedback_guidance.llm.base_url=localhost:8000", "match pattern"),
    ("algorithm.feedback_guidance.llm.base_url=http://me:secret@there/v1", "match pattern"),
    ("algorithm.feedback_guidance.llm.mode=both", "'enhanced' or 'full'"),
    ("train.alarm.mode=no way", "'off', 'warn' or 'stop'"),
    ("engine=vrel", "engine"),
    ("algorithm.feedback_guidance.start_rollout=8", "leave none that could read feedback"),
    ("algorithm.feedback_guidance.max_feedback_tokens=512", "no room for the task"),
    ("algorithm.overlong.buffer=500", "exceed max_tokens"),
    ("train.rollouts=true", "integer"),
    ("train.rollouts='8'", "integer"),
    ("arm=Mine!", "arm"),
    ("limits=3", "expected a section"),
])
def test_impossible_settings(override, words):
    assert any(words in e for e in errors(override))

@pytest.mark.parametrize("missing", ["algorithm.transfer.reexecute=false", "algorithm.transfer.name_dropout=0"])
def test_departments_are_left_out_only_where_the_name_is(missing):
    load_config(None, ["algorithm.transfer.department_dropout=0.5"])
    assert any("departments are left out of re-executed rows" in e for e in errors("algorithm.transfer.department_dropout=0.5", missing))

# 16 tasks x 8 rollouts in 4 updates on 2 ranks, the defaults, is 32 rollouts an update and 16 a rank
@pytest.mark.parametrize("overrides, words", [
    (["algorithm.updates=5"], "algorithm.updates: 16 tasks a step cannot be dealt out over 5 updates; use a divisor"),
    (["hardware.device=cuda", "hardware.gpus_per_node=5", "algorithm.transfer.mode=none"], "train.rollouts: an update of 4 tasks x 8 rollouts cannot be dealt out over 5 ranks"),
    (["hardware.device=cuda", "hardware.gpus_per_node=8", "hardware.nodes=3", "algorithm.transfer.rows=48"], "train.rollouts: an update of 4 tasks x 8 rollouts cannot be dealt out over 24 ranks"),
    (["hardware.device=cuda", "hardware.gpus_per_node=4", "hardware.tensor_parallel=3"], "hardware.tensor_parallel: 4 GPUs cannot be dealt out over servers of 3"),
    (["algorithm.transfer.rows=31"], "algorithm.transfer.rows: 31 replay rows cannot be dealt out over 2 ranks"),
    (["hardware.tensor_parallel=2"], "hardware.tensor_parallel: device 'cpu' is for tests: set tensor_parallel to 1"),
    (["hardware.attention=flash_attention_2"], "hardware.attention: device 'cpu' is for tests: set attention to sdpa"),
    (["hardware.dtype=bfloat16"], "hardware.dtype: device 'cpu' is for tests: set dtype to float32"),
    (["hardware.nodes=2"], "hardware.nodes: device 'cpu' is for tests: set nodes to 1"),
])
def test_what_verl_cannot_do_is_refused_there_and_only_there(overrides, words):
    found = errors("engine=verl", *overrides)
    assert len(found) == 1 and found[0].endswith(words)
    load_config(None, ["engine=local", *overrides])

def test_verl_takes_the_defaults(): assert load_config(None, ["engine=verl"]).engine == "verl"

def test_a_single_update_must_fit_the_ranks_and_the_rest_does_not_matter():
    load_config(None, ["engine=verl", "hardware.device=cuda", "hardware.gpus_per_node=8", "hardware.nodes=2", "algorithm.updates=4"]) # 32 rollouts an update, 16 ranks
    load_config(None, ["engine=verl", "algorithm.transfer.rows=31", "algorithm.transfer.mode=strip"]) # Without replay nobody deals out its rows

def test_feedback_that_would_never_be_shown_is_refused():
    top = "algorithm.feedback_guidance"
    on = [f"{top}.use_llm_enhancement=true", f"{top}.llm.max_tokens=161"]
    assert "a feedback of 161 tokens is not shown when algorithm.feedback_guidance.max_feedback_tokens is 160" in errors(*on)[0]
    load_config(None, [*on, f"{top}.max_feedback_tokens=161"])
    load_config(None, on[1:])
    load_config(None, [*on, f"{top}.enable=false"])

@pytest.mark.parametrize("text", ["off", "'off'", "false"])
def test_an_alarm_can_be_off_in_plain_yaml(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"train:\n  alarm: {{mode: {text}}}\n")
    c = load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(dump(c))
    assert c.train.alarm.mode == "off" and load_config(tmp_path / "c.yaml") == c

def test_a_cold_filter_needs_two_cold_rows():
    top = "algorithm.feedback_guidance"
    assert "one cold row always does" in errors("algorithm.filter_on=cold", f"{top}.start_rollout=1")[0]
    load_config(None, ["algorithm.filter_on=cold", f"{top}.start_rollout=1", f"{top}.enable=false"])

@pytest.mark.parametrize("text, words", [("seed: 1\nseed: 2", "is there twice"), ("seed: [1", "not YAML"), ("- 1", "expected `key: value`"), ("train:\n  steps: 1\n  steps: 2", "c.yaml:3: 'train.steps' is there twice, first in line 2")])
def test_a_broken_file_is_named(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    found = errors(path=tmp_path / "c.yaml")
    assert words in found[0] and str(tmp_path / "c.yaml") in found[0]

# YAML as it is read here

@pytest.mark.parametrize("override, words", [
    ("seed=010", "write 10"), ("seed=-010", "write -10"), ("seed=1_000", "write 1000, without quotes"), ("seed=1:30", "write one plain number"), ("seed='8'", "write 8, without quotes"), ("algorithm.lr=1,5", "write one plain number"), ("data.shuffle=yes", "write true"),
    ("data.shuffle=off", "write false"), ("data.shuffle='true'", "write true"), ("algorithm.lr=010", "write 10"),
    ("train.steps=true", "allowed is from 1 to 1_000_000_000"), ("train.steps=3.0", "allowed is from 1 to"), ("train.steps=0", "allowed is from 1 to"), ("train.steps=-3", "allowed is from 1 to"),
    ("train.steps=99999999999", "allowed is from 1 to"), ("train.steps=" + "9" * 6000, "a number of 6000 characters is too long"), ("train.threads=1025", "from 1 to 1_024"), ("seed=4294967296", "from 0 to 4_294_967_295"),
    ("algorithm.feedback_guidance.wave_sizes=[2, 0]", "wave_sizes.1: "), ("algorithm.feedback_guidance.wave_sizes=[2, 0]", "allowed is from 1 to"),
    *((f"{key}={bad}", "allowed is from 0.05 to 20") for key in ("train.temperature", "algorithm.transfer.temperature") for bad in ("0", "1e-9", "-1", "21", ".nan", ".inf", "-.inf", "1e400", "true", "warm")),
    *((f"evaluation.temperature={bad}", words) for bad, words in (("1e-9", "0 (greedy) or from 0.05"), ("-1", "from 0 to 20"), (".nan", "from 0 to 20"), ("21", "from 0 to 20"))),
    ("algorithm.clip_low=1", "and below 1"), ("algorithm.lr=0", "from 1e-12 to 1"), ("algorithm.pg_weight=1e9", "from 0 to 1_000"),
    ("train.log=[jsonl, paper]", "train.log.1"), ("train={steps: 3, stepps: 4}", "unknown key 'train.stepps'; the nearest is 'train.steps'"),
    ("policy.checkpoint=$NO_SUCH_NAME/x", "no variable NO_SUCH_NAME"), ("policy.checkpoint=~nobody-here/x", "there is no user 'nobody-here'"), ("policy.checkpoint=''", "at least 1 character"), ("data.folder=\"a\\0b\"", "U+0000"), ("arm=\"\\ud800\"", "U+D800"),
    ("seed=*a", "no anchor 'a'"), ("seed=&a [*a]", "'a' holds itself"), ("seed=!!python/object:os.system x", "is not understood; leave it out"), ("seed=" + "[" * 50_000, "nested more than 30 levels"), ("seed=[1", "not YAML"),
])
def test_a_value_that_is_not_what_it_seems_is_refused_with_what_was_meant(override, words):
    found = errors(override)
    assert any(words in e for e in found) and all(e.startswith("override ") for e in found), found

@pytest.mark.parametrize("text, value", [("0", 0), ("-3", -3), ("+3", 3), ("0x1F", 31), ("0o17", 15), ("3e-4", 3e-4), ("1.", 1.0), (".5", .5), ("007.5", 7.5), ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("010", "010"), ("1:30", "1:30"), ("1:30:00", "1:30:00"),
    ("1_000", "1_000"), ("yes", "yes"), ("No", "No"), ("on", "on"), ("off", "off"), ("2026-01-31", "2026-01-31"), ("'3'", "3"), ('"true"', "true"), ("!!str 3", "3"), ("! 3", "3"), ("=", "="), ("٣", "٣"), ("0b11", "0b11"), ("1e", "1e"), (".", "."), ("-", [None])])
def test_plain_values_are_read_as_yaml_1_2_reads_them(text, value):
    found = parse_override(f"seed={text}")["seed"]
    assert found == value and type(found) is type(value)

def test_anchors_may_be_merged_again_and_again():
    text = "base: &b {x: 1, y: 1}\none: &o {<<: *b, y: 2}\ntwo: {<<: *o, z: 3}\nthree: {<<: *o}\nfour: {<<: [*b, *o]}\nfive: {<<: *b, <<: *o, x: 5}\nsix: *o"
    raw = read_yaml(text)
    assert raw == dict(base=dict(x=1, y=1), one=dict(x=1, y=2), two=dict(x=1, y=2, z=3), three=dict(x=1, y=2), four=dict(x=1, y=1), five=dict(x=5, y=1), six=dict(x=1, y=2))

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))

@pytest.mark.parametrize("text, line, words", [
    (LAUGHS, 5, "unfold into more than"), ("a: &a\n  b: *a", 2, "holds itself"), ("a: 1\nb: *c", 2, "no anchor 'c'"), ("a: 1\nb: " + "[" * 100_000, 2, "nested more than"), ("a: 1\nb: " + "{a: " * 50_000, 2, "nested more than"),
    ("- " * 100_000, 1, "nested more than"), ("seed: 1\n\narm: x\nseed: 2", 4, "'seed' is there twice, first in line 1"), ("train:\n  steps: 1\n  'steps': 2", 3, "'train.steps' is there twice, first in line 2"), ("a: 1\n---\nb: 2", 2, "a second document"), ("a: 1\n? [x, y]\n: 3", 2, "plain word"),
    ("a: 1\n\tb: 2", 2, "not YAML"), ("a: !!binary x\nb: !y z", 1, "is not understood"), ("a: \x07", 1, "not YAML"), ("a: 1\nb: \"\\ud800\"", 2, "U+D800"), ("<<: 3", 1, "takes a section"), ("- 1", 1, "expected `key: value`"), ("x" * 500_000, 1, "settings have at most"),
])
def test_what_no_honest_file_holds_is_refused_at_once_with_its_line(text, line, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    began = time.monotonic()
    found = errors(path=tmp_path / "c.yaml")
    assert time.monotonic() - began < 2
    assert found[0].startswith(f"{tmp_path / 'c.yaml'}:{line}: ") and words in found[0], found[0][:200]

def test_every_repeated_key_is_named_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\ntrain: {steps: 1, steps: 2}\nseed: 3\n")
    assert [e.partition("c.yaml:")[2] for e in errors(path=tmp_path / "c.yaml")] == ["2: 'train.steps' is there twice, first in line 2; keep one", "3: 'seed' is there twice, first in line 1; keep one"]

@pytest.mark.parametrize("text, key, words", [("train.steps: 3", "train.steps", "write train: {steps: 3}"), ("algorithm: {transfer.mode: none}", "transfer.mode", "write transfer: {mode: none} below algorithm"),
    ("algorithm.feedback_guidance.llm.model: x", "algorithm.feedback_guidance.llm.model", "write algorithm: {feedback_guidance: {llm: {model: x}}}"), ("train.step: 3", "train.step", "the nearest is 'train.steps'")])
def test_a_path_in_one_word_is_answered_with_how_it_is_written(text, key, words, tmp_path):
    (tmp_path / "c.yaml").write_text(f"seed: 1\n{text}\n")
    (found,) = errors(path=tmp_path / "c.yaml")
    assert found.startswith(f"{tmp_path / 'c.yaml'}:2: ") and repr(key) in found and words in found

@pytest.mark.parametrize("encoding, words", [("utf-16", ":1: is UTF-16"), ("utf-16-le", ":1: is UTF-16"), ("utf-32", ":1: is UTF-16 or UTF-32"), ("latin-1", ":2: byte 0xe9 is not UTF-8")])
def test_another_encoding_is_named_with_the_file(encoding, words, tmp_path):
    (tmp_path / "c.yaml").write_bytes("seed: 1\n# café\n".encode(encoding))
    assert errors(path=tmp_path / "c.yaml")[0].startswith(f"{tmp_path / 'c.yaml'}{words}")
    with pytest.raises(ConfigError, match="UTF-8"): load_arms(tmp_path / "c.yaml")

def test_utf_8_is_read_whatever_the_locale_and_with_a_mark(tmp_path):
    (tmp_path / "c.yaml").write_bytes("\ufeffdata: {folder: daten/größe}\n".encode())
    assert load_config(tmp_path / "c.yaml").data.folder == "daten/größe"
    code = f"from fg_dapo.config import load_config; print(ascii(load_config({str(tmp_path / 'c.yaml')!r}).data.folder))"
    r = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(CONFIGS.parents[1])})
    assert r.stdout.strip() == ascii("daten/größe"), r.stderr

def test_home_and_variables_are_expanded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path / "m"))
    c = load_config(None, ["data.folder=~/data", "policy.checkpoint=$MODELS/tiny", "algorithm.feedback_guidance.llm.cache=${HOME}/cache"])
    assert (c.data.folder, c.policy.checkpoint, c.algorithm.feedback_guidance.llm.cache) == tuple(str(tmp_path / x) for x in ("data", "m/tiny", "cache"))
    (tmp_path / "c.yaml").write_text(dump(c))
    assert load_config(tmp_path / "c.yaml") == c
    assert load_config(None, ["policy.checkpoint=Qwen/Qwen3-8B", "data.folder=a~b/c$"]).data.folder == "a~b/c$"

def test_an_error_names_the_line_also_behind_an_alias(tmp_path):
    (tmp_path / "c.yaml").write_text("common:\n  train: &t {steps: 0}\narms:\n  one: {train: {<<: *t, rollouts: 6}}\n  two:\n    seed: -1\n")
    with pytest.raises(ConfigError) as e: load_arms(tmp_path / "c.yaml")
    assert [x.partition("c.yaml:")[2][:18] for x in e.value.errors] == ["4: train.steps: in", "2: train.steps: in", "6: seed: input sho"]

@given(st.one_of(st.text(max_size=12), st.sampled_from(["010", "1:30", "yes", "off", "~", "<<", "=", "0o7", "1e5", "1_0", "null", "0x1", ".5", "-", "*a", "&a", "!x", "%", "@", "`", "a: b", "a #b", "- a", "? a", "2026-01-31", "1.", "+1", ".inf"])))
@settings(deadline=None, max_examples=200)
def test_any_text_is_written_so_that_it_reads_back_as_that_text(text):
    bad = any(not (ch.isprintable() or ch in "\n\t") or 0xD800 <= ord(ch) < 0xE000 for ch in text)
    if bad: return
    made = RunConfig(algorithm=dict(feedback_guidance=dict(llm=dict(model=f"x{text}"))))
    assert check_config(read_yaml(dump(made))) == made
    if text: assert read_yaml(f"x: {_yaml_text(text)}") == dict(x=text)

def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="none.yaml.*experiments/configs"): load_config("none.yaml")

@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", "a.b", ".=2"])
def test_a_bad_override_shows_the_form(text):
    with pytest.raises(ConfigError, match="section.key=value"): parse_override(text)

@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["train", "seed", "algorithm", "steps", "x", 1]), x, max_size=3), max_leaves=8))
@settings(deadline=None, max_examples=200)
def test_whatever_yaml_holds_gives_a_config_or_a_config_error(x):
    raw = yaml.safe_load(yaml.safe_dump(dict(train=x)))
    try: assert isinstance(check_config(raw), RunConfig)
    except ConfigError as e: assert all(e.errors)

# Arms

def test_arms_are_named_and_overridden(tmp_path):
    p = tmp_path / "a.yaml"
    p.write_text("common: {train: {steps: 3}}\narms: {one: {seed: 4}, two: }\n")
    arms = load_arms(p, ["train.rollouts=6"], ["two", "one"])
    assert [(n, c.arm, c.seed, c.train.steps, c.train.rollouts) for n, c in arms.items()] == [("two", "two", 0, 3, 6), ("one", "one", 4, 3, 6)]

@pytest.mark.parametrize("text, words", [("seed: 1", "needs a section 'arms'"), ("arms: {a: {sed: 1}}", "the nearest is 'seed'"), ("arms: {a: }\ncomon: {}", "unknown key 'comon'"), ("arms: {a: 3}", "expected a section")])
def test_a_broken_comparison_is_named(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words): load_arms(tmp_path / "a.yaml")

def test_one_mistake_is_reported_once():
    found = errors("train.rollouts=x", "algorithm.feedback_guidance.start_rollout=9")
    assert len(found) == 1 and "train.rollouts" in found[0] # Not also that 9 exceeds the default of 8
