"""Experiments: the runner under faults, result files, worlds of another kind, the protocol and its statistics."""
import hashlib, json, os, re, signal, stat, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from typer.testing import CliRunner

import fg_dapo.matrix as matrix
from fg_dapo.cli import app
from fg_dapo.config import ConfigError, RunConfig, load_config, read_yaml
from fg_dapo.core import append_jsonl, read_json, read_jsonl
from fg_dapo.demo import Job, hold, is_held, seconds_left
from fg_dapo.evaluation.metrics import (ablation_table, arm_iqm, by_position, check_protocol, claims, cold_rate, criteria_markdown, first_reach, guided_gap,
    iqm, mean_interval, paired, reach_of, reach_table, sign_flip, stratified_bootstrap, verdict)
from fg_dapo.evaluation.report import claims_table
from fg_dapo.matrix import MAX_BYTES, collect, load_matrix, load_results, make_jobs, read_result, run_matrix, save_result, status_table
from fg_dapo.world.generate import KINDS, REQUIREMENTS, generate_world, keep_world, kind_of, odd_fields, rule_solves, rules_ceiling
from fg_dapo.core import rng_for
from fg_dapo.world.records import TOLERANCE, save_world
from fg_dapo.world.validate import validate_files

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
quick = settings(max_examples=60, deadline=None, derandomize=True)

# The runner, with a short script in the place of the trainer

STUB = r'''#!PYTHON
"Stands in for `python -m fg_dapo.cli`: a step takes a few hundredths of a second, and every success rate is a function of the step."
import json, os, re, sys, time
from pathlib import Path
stage, args = sys.argv[3], sys.argv[4:]
def option(name, default=None): return args[args.index(name) + 1] if name in args else default
def add(path, row):
    with open(path, "a") as f: f.write(json.dumps(row) + "\n")
run = Path(option("--out")) if stage == "train" else Path(args[0])
run.mkdir(parents=True, exist_ok=True)
add("started.txt", [stage + (" greedy" if option("--temperature") == "0.0" else ""), run.name, os.getpid()])
busy = run / "busy"
try: os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    if Path(f"/proc/{busy.read_text() or 0}").exists(): add("twice.txt", run.name); sys.exit(9)
busy.write_text(str(os.getpid()))
if stage == "train":
    text = Path(option("--config")).read_text()
    steps, arm, seed = int(re.search(r"^train:.*\n  steps: (\d+)", text, re.M)[1]), re.search(r"^arm: (\S+)", text, re.M)[1], int(re.search(r"^seed: (\d+)", text, re.M)[1])
    if Path("boom").exists() and Path("boom").read_text() == arm: print("it burst"); sys.exit(3)
    if not (run / "manifest.json").exists(): (run / "manifest.json").write_text(json.dumps(dict(config=dict(arm=arm, train=dict(steps=steps)), seed=seed, versions=dict(python="3"), git_commit="abc")))
    done = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
    for s in range(done + 1, steps + 1):
        time.sleep(float(os.environ.get("STUB_SECONDS", "0.01")))
        p = min(1.0, s / 10)
        add(run / "metrics.jsonl", dict(step=s, rollouts=128 * s, acc_by_position=[p / 2, p], acc_cold=p / 2, acc_guided=p, groups=16, groups_kept=8, solved_tasks=s, ledger=dict(rollouts=128 * s, tokens=9000 * s, seconds=2.0 * s, updates=s)))
        if s % 2 == 0: add(run / "evals.jsonl", dict(step=s, tasks=16 * s, rollouts=128 * s, tokens=9000 * s, seconds=2.0 * s, split="val", mode="cold", temperature=1.0, n=100, acc=p / 2, acc_training_companies=p / 2, acc_heldout=p / 4, n_training_companies=50, n_heldout=50))
else:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    out, t = Path(option("--out", str(run))), float(option("--temperature"))
    out.mkdir(parents=True, exist_ok=True)
    row = dict(step=last, tasks=16 * last, rollouts=128 * last, split="test", temperature=t, n=4, acc=0.5, acc_training_companies=0.5, acc_heldout=0.5)
    modes = [option("--mode")] if option("--mode") else ["cold", "feedback"]
    for m in modes: add(out / "evals.jsonl", dict(row, mode=m, k=1))
    rows = [dict(task_id=f"test-{i}", group=i, level=1 + i % 2, heldout=i > 1, acc=int(i % 2 == 0), failure=None if i % 2 == 0 else "missing_auth", mode="cold", attempt=0, split="test", temperature=t) for i in range(4)]
    rows += [dict(r, mode="feedback") for r in rows if "feedback" in modes] + [dict(r, mode="feedback", attempt=1, acc=1, failure=None) for r in rows if "feedback" in modes and not r["acc"]]
    (out / "eval_rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
busy.unlink()
'''

MATRIX = """purpose: exploration
base: arms.yaml
common: {{policy: {{checkpoint: model}}}}
budget: {{steps: {steps}}}
arms: [dapo, fg_replay]
seeds: [0, 1]
worlds: [{{seed: 100}}]
"""
ARMS = "common: {train: {eval_every: 2}, evaluation: {split: test}}\narms:\n  dapo: {algorithm: {feedback_guidance: {enable: false}, transfer: {mode: none}}}\n  fg_replay:\n"

@pytest.fixture(scope="module")
def world100(tmp_path_factory):
    "The bytes of one world, made once."
    return {p.name: p.read_bytes() for p in keep_world(tmp_path_factory.mktemp("world"), 100)}

@pytest.fixture
def bench(tmp_path, monkeypatch, world100):
    "A folder with a matrix, a model that nothing loads, and the stand-in where Python would be."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for n in ("config.json", "model.safetensors"): (tmp_path / "model" / n).write_text("{}")
    stub = tmp_path / "stub"
    stub.write_text(STUB.replace("PYTHON", sys.executable))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(stub))
    (tmp_path / "arms.yaml").write_text(ARMS)
    def quick_world(folder, seed, kind="standard", force=False):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for n, b in world100.items(): (Path(folder) / n).write_bytes(b)
        return [Path(folder) / n for n in world100]
    monkeypatch.setattr(matrix, "keep_world", quick_world)
    return tmp_path

def jobs_of(steps=6, text=MATRIX):
    Path("m.yaml").write_text(text.format(steps=steps))
    return make_jobs(load_matrix("m.yaml"), "out")

def run(jobs, **kw):
    said = []
    failed = run_matrix(jobs, 2, say=said.append, pause=.02, **kw)
    return failed, said

def started(): return [(s, n) for s, n, _ in read_jsonl("started.txt")] if Path("started.txt").exists() else []

def test_a_matrix_runs_once_and_leaves_small_results(bench):
    jobs = jobs_of()
    assert [j.name for j in jobs] == [f"standard-100-{a}-s{s}" for s in (0, 1) for a in ("dapo", "fg_replay")]
    failed, said = run(jobs)
    assert failed == [] and all(j.done() for j in jobs) and len(started()) == 12
    for j in jobs: assert [s for s, n in started() if n == j.run.name] == ["train", "evaluate", "evaluate greedy"]
    files = sorted(Path("out/results").iterdir())
    assert [f.name for f in files] == sorted(f"{j.name}.json" for j in jobs) and all(f.stat().st_size < MAX_BYTES for f in files)
    r = read_result(jobs[0].result)
    assert (r["arm"], r["seed"], r["world"], r["purpose"], r["git_commit"]) == ("dapo", 0, dict(name="standard-100", kind="standard", seed=100, version=1), "exploration", "abc")
    assert [e["step"] for e in r["evals"]] == [2, 4, 6] and r["steps"]["acc_by_position"][3] == [.2, .4] and r["ledger"]["rollouts"] == 768
    assert r["cells"]["cold"] == dict(heldout={"1": dict(n=1, solved=1, failures={}), "2": dict(n=1, solved=0, failures=dict(missing_auth=1))}, training={"1": dict(n=1, solved=1, failures={}), "2": dict(n=1, solved=0, failures=dict(missing_auth=1))})
    assert sorted(r["cells"]) == ["cold", "feedback", "greedy"] and [(f["mode"], f["temperature"]) for f in r["final"]] == [("cold", 1.0), ("feedback", 1.0), ("cold", 0.0)]
    assert r["effect"] == [dict(kind="missing_auth", n=2, solved=2, same=0, other=0, share_solved=1.0, low=pytest.approx(.342, abs=.001), high=pytest.approx(1.0))]
    assert sorted(r["wall_seconds"]) == ["evaluate", "greedy", "train"] and .5 < r["ceiling"]["heldout"] < 1
    assert str(bench) not in files[0].read_text() and r["config"]["data"]["folder"] == "standard-100"
    assert run(jobs) == ([], []) and len(started()) == 12
    assert len(load_results("out")) == 4 and load_results("out", "confirmation") == []

def test_a_torn_result_is_collected_again_without_training(bench):
    jobs = jobs_of()
    run(jobs)
    whole, n = jobs[1].result.read_text(), len(started())
    jobs[1].result.write_text(whole[:len(whole) // 2])
    jobs[2].result.unlink()
    assert [j.done() for j in jobs] == [True, False, False, True]
    with pytest.raises(ValueError, match="is not a result of this version"): load_results("out")
    assert run(jobs)[0] == [] and len(started()) == n and jobs[1].result.read_text() == whole

def test_other_settings_are_run_again_in_a_folder_of_their_own(bench):
    old = jobs_of(4)
    run(old)
    new = jobs_of(6)
    assert [j.result for j in new] == [j.result for j in old] and not any(j.done() for j in new) and {j.digest for j in new}.isdisjoint(j.digest for j in old)
    assert run(new)[0] == [] and all(j.done() for j in new) and not any(j.done() for j in old) and all(j.run.exists() for j in old)

def test_another_model_or_world_is_another_result(bench, world100, monkeypatch):
    before = [j.digest for j in jobs_of()]
    (bench / "model/model.safetensors").write_text("other weights")
    weights = [j.digest for j in jobs_of()]
    monkeypatch.setitem(world100, "companies.json", world100["companies.json"] + b"\n")
    both = [j.digest for j in jobs_of()]
    assert len({*before, *weights, *both}) == 12

def test_committed_results_are_done_though_the_runs_are_gone(bench):
    jobs = jobs_of()
    run(jobs)
    subprocess.run(["rm", "-r", "out/runs"], check=True)
    again = jobs_of()
    assert all(j.done() for j in again) and run(again) == ([], []) and seconds_left(again, 2) is None

def pids(stage="train"): return {n: p for s, n, p in read_jsonl("started.txt") if s == stage} if Path("started.txt").exists() else {}

def until(what, seconds=8):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.01)

@pytest.mark.parametrize("tries", [1, 2])
def test_a_killed_run_goes_on_from_where_it_was(bench, monkeypatch, tries):
    monkeypatch.setenv("STUB_SECONDS", "0.05")
    jobs, hit = jobs_of(8)[:1], []
    def say(line): said.append(line)
    said = []
    def watch_and_kill(pause):
        real_sleep(pause)
        if not hit and jobs[0].run.exists() and (jobs[0].run / "metrics.jsonl").exists() and len(read_jsonl(jobs[0].run / "metrics.jsonl", torn_tail=True)) >= 3:
            hit.append(pids()[jobs[0].run.name])
            os.kill(hit[0], signal.SIGKILL)
    real_sleep = time.sleep
    monkeypatch.setattr("fg_dapo.demo.time.sleep", watch_and_kill)
    failed = run_matrix(jobs, 1, tries=tries, say=say, pause=.02)
    assert any("was killed (signal 9)" in x for x in said)
    if tries == 1:
        assert len(failed) == 1 and "standard-100-dapo-s0.train.log" in failed[0] and not jobs[0].done()
        assert jobs[0].state() == "started" and run_matrix(jobs, 1, say=say, pause=.02) == []
    else: assert failed == [] and any("try 2 of 2 follows" in x for x in said)
    assert jobs[0].done() and [r["step"] for r in read_jsonl(jobs[0].run / "metrics.jsonl")] == list(range(1, 9))

RUNNER = """
import sys
python, sys.executable = sys.executable, {stub!r}
import fg_dapo.matrix as matrix
from pathlib import Path
matrix.keep_world = lambda folder, seed, kind="standard", force=False: sorted(Path(folder).iterdir())
jobs = matrix.make_jobs(matrix.load_matrix("m.yaml"), "out")
sys.exit(bool(matrix.run_matrix(jobs, 2, say=lambda line: print(line, flush=True), pause=.02)))
"""

def test_a_killed_runner_is_followed_by_another_and_no_run_is_started_twice(bench):
    jobs = jobs_of(8)
    python = (bench / "stub").read_text().splitlines()[0][2:]
    command = [python, "-c", RUNNER.format(stub=str(bench / "stub"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=env | dict(STUB_SECONDS="1.5"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(pids()) == 2)
    first.kill()
    first.wait(5)
    orphans = list(pids().values())
    assert all(Path(f"/proc/{p}").exists() for p in orphans) and [j.state() for j in jobs[:2]] == ["running", "running"]
    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("waits, an earlier process still works on it") == 2 and not Path("twice.txt").exists()
    assert all(j.done() for j in jobs) and all([r["step"] for r in read_jsonl(j.run / "metrics.jsonl")] == list(range(1, 9)) for j in jobs)

def test_what_fails_is_named_and_the_rest_goes_on(bench):
    Path("boom").write_text("dapo")
    jobs = jobs_of()
    failed, said = run(jobs, tries=2)
    assert len(failed) == 2 and all("dapo-s" in f and "train failed (exit 3); see out/runs/logs/" in f for f in failed) and any("it burst" in s for s in said)
    assert [j.done() for j in jobs] == [False, True, False, True]
    Path("boom").unlink()
    assert run(jobs)[0] == [] and all(j.done() for j in jobs)

def test_a_run_without_its_evaluation_is_a_failure_not_a_result(bench):
    jobs = jobs_of()[:1]
    run(jobs)
    jobs[0].result.unlink()
    (jobs[0].run / "evals.jsonl").write_text("")
    failed, _ = run(jobs, tries=1)
    if failed: assert "results could not be collected" in failed[0]
    assert not jobs[0].done() or read_result(jobs[0].result)["final"]

def test_status_counts_and_starts_nothing(bench):
    jobs = jobs_of()
    run(jobs[:1])
    append_jsonl(jobs[1].run / "metrics.jsonl", dict(step=3))
    lock = hold(jobs[2].lock)
    assert [j.state() for j in jobs] == ["done", "started", "running", "missing"]
    n = len(started())
    r = CliRunner().invoke(app, ["matrix", "-c", "m.yaml", "--out", "out", "--status"])
    assert r.exit_code == 0 and "1 done, 1 running, 1 started, 1 missing" in r.output and "started 3/6" in r.output and len(started()) == n
    lock.close()
    assert not is_held(jobs[2].lock)

def test_the_command_runs_a_matrix_and_exits_with_1_when_something_failed(bench):
    jobs_of()
    Path("boom").write_text("fg_replay")
    r = CliRunner().invoke(app, ["matrix", "-c", "m.yaml", "--out", "out", "--tries", "1"])
    assert r.exit_code == 1 and "2 things are wrong" not in r.output and "fg_replay-s0: train failed" in r.output and "run the same command to go on" in r.output
    Path("boom").unlink()
    r = CliRunner().invoke(app, ["matrix", "-c", "m.yaml", "--out", "out"])
    assert r.exit_code == 0 and "all 4 results are in out/results" in r.output

def test_the_time_left_is_by_the_pace_of_each_arm(bench):
    jobs = jobs_of(10)
    append_jsonl(jobs[0].run / "metrics.jsonl", dict(step=5, ledger=dict(seconds=10.0))) # dapo: 2 s a step
    append_jsonl(jobs[1].run / "metrics.jsonl", dict(step=2, ledger=dict(seconds=12.0))) # fg_replay: 6 s a step
    assert seconds_left(jobs, 2) == (5 * 2 + 8 * 6 + 10 * 2 + 10 * 6) / 2

def test_a_long_run_still_makes_a_small_file(bench):
    rows = [dict(step=s, rollouts=128 * s, acc_by_position=[.123456] * 8, acc_cold=.123456, acc_guided=.7, groups=16, groups_kept=8, entropy=1.23456789, ledger=dict(tokens=9000 * s, seconds=5.5 * s, updates=s)) for s in range(1, 5001)]
    columns = matrix.step_columns(rows)
    assert columns["step"][-1] == 5000 and len(columns["step"]) <= 400 and len({len(v) for v in columns.values()}) == 1
    assert save_result(bench / "r.json", matrix.rounded(dict(steps=columns))).stat().st_size < MAX_BYTES
    with pytest.raises(ValueError, match="more than 200,000"): save_result(bench / "r.json", dict(x="x" * 200_001))

# Matrix files

@pytest.mark.parametrize("old, new, words", [
    ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: needs different whole numbers"),
    ("seeds: [0, 1]", "seeds: 3", "got 3"),
    ("purpose: exploration", "purpose: test", "got 'test'"),
    ("budget", "bugdet", "the nearest is 'budget'"),
    ("[dapo, fg_replay]", "[dapo, fg_reply]", "the nearest is 'fg_replay'"),
    ("{{seed: 100}}", "{{seed: 100, kind: hard}}", "there are standard, easy"),
    ("{{seed: 100}}", "{{seed: 100}}, {{seed: 100}}", "the same world is there twice"),
    ("{{seed: 100}}", "{{kind: easy}}", "needs a seed"),
    ("{{seed: 100}}", "{{seed: 100, arms: [golf]}}", "unknown arm 'golf'"),
    ("{{seed: 100}}", "{{seed: 100, arms: {{dapo: {{train: {{step: 3}}}}}}}}", "worlds.0.arms.dapo: unknown key 'train.step'"),
    ("{{seed: 100}}", "{{seed: 100, arms: {{dapo: {{seed: 3}}}}}}", "leave it to `seeds`"),
    ("{{steps: {steps}}}", "{{step: 3}}", "'train.steps'"),
    ("{{checkpoint: model}}}}", "{{checkpoint: model}}, seed: 3}}", "leave it to `seeds`"),
])
def test_a_wrong_matrix_is_refused_with_the_way_out(bench, old, new, words):
    assert old in MATRIX
    Path("m.yaml").write_text(MATRIX.replace(old, new).format(steps=6))
    with pytest.raises(ConfigError) as e: load_matrix("m.yaml")
    assert words in str(e.value) and "m.yaml: " in str(e.value)

@pytest.mark.parametrize("mine, theirs", [("exploration", "confirmation"), ("confirmation", "exploration")])
def test_worlds_are_explored_or_confirmed_never_both(bench, mine, theirs):
    text = MATRIX.format(steps=6)
    Path("m.yaml").write_text(text.replace("exploration", mine))
    Path("other.yaml").write_text(text.replace("exploration", theirs).replace("[{seed: 100}]", "[{seed: 7}, {seed: 100, kind: easy}]"))
    with pytest.raises(ValueError, match=f"{mine} in worlds of seed 100, which other.yaml uses for {theirs}"): load_matrix("m.yaml")
    Path("other.yaml").write_text(text.replace("exploration", theirs).replace("100", "7"))
    assert load_matrix("m.yaml").purpose == mine

def test_the_committed_matrices_keep_the_protocol():
    ranges = read_yaml((EXPERIMENTS / "protocol.yaml").read_text())["worlds"]
    files = sorted((EXPERIMENTS / "configs").glob("matrix_*.yaml"))
    assert {f.name for f in files} >= {"matrix_confirm.yaml", "matrix_explore.yaml", "matrix_tune.yaml"}
    for f in files:
        m = load_matrix(f)
        low, high = ranges[m.purpose]
        assert all(low <= w.seed <= high for w in m.worlds), f.name
    m = load_matrix(EXPERIMENTS / "configs/matrix_confirm.yaml")
    assert m.purpose == "confirmation" and len(m.seeds) >= 5 and {w.kind for w in m.worlds} == {"standard", "easy"}

def test_dapo_the_control_and_ours_are_tuned_with_as_many_tries():
    arms = load_matrix(EXPERIMENTS / "configs/matrix_tune.yaml").arms
    count = {k: sum(a.startswith(k) for a in arms) for k in ("dapo_", "control_", "fg_")}
    assert count["dapo_"] >= count["fg_"] and count["control_"] >= count["fg_"] and len({c.model_copy(update=dict(arm="x")).model_dump_json() for c in arms.values()}) == len(arms)

# Worlds of another kind

@pytest.fixture(scope="module", params=[0, 101, 201])
def easy(request): return generate_world(request.param, "easy")

def test_an_easy_world_is_valid_and_cheap_to_ask_in(easy, tmp_path):
    p = save_world(easy, tmp_path)
    assert validate_files(p["companies"], p["users"], [p["train"], p["val"], p["test"]]) == []
    deps = [d for c in easy.companies.values() for d in c.departments]
    assert {len(d.auth_fields) for d in deps} == {1, 2} and {f for d in deps for f in d.accepted} == {"account_number", "full_name", "phone_number"}
    assert {u.behavior for u in easy.users.values()} == {"cooperative"} and kind_of(easy) == "easy"
    for split, n in dict(train=500, val=100, test=500).items():
        assert len(easy.tasks[split]) == n and {t.level for t in easy.tasks[split]} == {1, 3, 4, 5}
        assert all(len({"account_number", "full_name", "phone_number"} - set(s.accepted)) <= s.user.tolerance for s in easy.scenarios(split))

def test_asking_for_all_three_fields_solves_what_the_path_allows(easy):
    from fg_dapo.agent.scripted import best_plan, call, play
    def ask_for_all(s):
        replies = yield call("search_company", company_name=s.company.name)
        phones = {d["name"]: d["phone"] for d in replies[0].data["departments"]}
        replies = yield call("auth_info_form", fields=["account_number", "full_name", "phone_number"])
        known = {f: v for f, v in replies[0].data["values"].items() if v is not None} # What the user lacks has an alternative, or the task does not end served
        for name, _ in best_plan(s).calls: yield call("make_phone_call", phone_number=phones[name], auth_info=known)
    served = [s for s in easy.scenarios("val") if s.task.ground_truth.ending == "served"]
    assert len(served) == 96 and [s.task for s in served if not play(ask_for_all(s), s).success] == []

def test_the_ceiling_of_an_easy_world_is_that_of_its_paths(easy):
    c = rules_ceiling(easy)
    assert .7 < c["heldout"] < .95 and .7 < c["training"] < .95
    s = easy.scenarios("test")
    from fg_dapo.world.generate import rule_path
    right = [rule_path(x.task.request_type, x.company.industry, tuple(d.name for d in x.company.departments)) == x.task.ground_truth.path for x in s]
    assert [rule_solves(x, "easy") for x in s] == right

def test_kinds_do_not_touch_the_standard_world():
    import hashlib
    one, two = generate_world(3), generate_world(3, "standard")
    assert one == two and kind_of(one) == "standard" and one != generate_world(3, "easy")
    assert KINDS["standard"].requirements is REQUIREMENTS
    with pytest.raises(ValueError, match="no kind of world 'hard'"): generate_world(0, "hard")

@quick
@given(st.integers(0, 2**32), st.sampled_from(sorted(KINDS["easy"].requirements)))
def test_an_easy_exception_stays_easy(seed, key):
    old = set(KINDS["easy"].requirements[key])
    new = set(odd_fields(rng_for(seed), KINDS["easy"].requirements[key], key[0], KINDS["easy"]))
    assert new != old and 1 <= len(new) <= 2 and new <= set(KINDS["easy"].fields) and len(old ^ new) <= 2

def test_the_command_writes_a_world_of_a_kind(tmp_path):
    r = CliRunner().invoke(app, ["data", "--out", str(tmp_path / "e"), "--kind", "easy", "--seed", "5"])
    assert r.exit_code == 0 and "easy world of seed 5" in r.output
    from fg_dapo.world.records import load_world
    assert load_world(tmp_path / "e") == generate_world(5, "easy")
    r = CliRunner().invoke(app, ["data", "--out", str(tmp_path / "e"), "--seed", "5"])
    assert r.exit_code == 1 and "already holds other data" in r.output

def test_demonstrations_of_the_warm_start_read_no_world(monkeypatch):
    import fg_dapo.world.generate as generate, fg_dapo.world.records as records
    from fg_dapo.agent.chat import chat_format
    from fg_dapo.policy import demonstration
    def no(*a, **kw): raise AssertionError("the warm start looked at a world")
    for n in ("generate_world", "make_companies", "ruled_company", "rule_path", "add_exceptions"): monkeypatch.setattr(generate, n, no)
    monkeypatch.setattr(records, "load_world", no)
    monkeypatch.setattr(generate, "REQUIREMENTS", None)
    monkeypatch.setattr(generate, "KINDS", None)
    texts = [str(demonstration(rng_for(0, "test", i), chat_format("compact"), hedge=bool(i % 2))) for i in range(60)]
    assert len(set(texts)) == 60

def test_a_random_company_knows_nothing_of_industry_and_department():
    from fg_dapo.world.generate import random_company
    table = {}
    for i in range(1500):
        c = random_company(rng_for(i, "independence"))
        for d in c.departments: table.setdefault((c.industry, d.name), []).extend(d.auth_fields)
    fields = sorted({f for v in table.values() for f in v})
    counts = np.array([[v.count(f) for f in fields] for v in table.values()])
    assert counts.shape == (20, 12) and stats.chi2_contingency(counts).pvalue > .01

# Statistics

@quick
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=9))
def test_sign_flip_is_scipys_paired_permutation_test(xs):
    ref = stats.permutation_test((np.array(xs),), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided").pvalue
    assert sign_flip(xs) == pytest.approx(min(1.0, ref), abs=1e-9)

def test_sign_flip_by_hand_and_with_many_pairs():
    assert sign_flip([]) is None and sign_flip([1, 2, 3]) == 2 / 8 and sign_flip([1, 2, -3]) == 1.0
    assert sign_flip([0, 0, 0]) == 1.0
    assert sign_flip([.1] * 30) < .001 and sign_flip([.1, -.1] * 15) == 1.0

@quick
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_mean_interval_is_scipys(xs):
    m = mean_interval(xs)
    if np.std(xs) < 1e-9: assert m["high"] - m["low"] < 1e-6; return
    low, high = stats.t.interval(.95, len(xs) - 1, loc=np.mean(xs), scale=stats.sem(xs))
    assert (m["low"], m["high"], m["value"], m["n"]) == (pytest.approx(low), pytest.approx(high), pytest.approx(np.mean(xs)), len(xs))

def test_mean_interval_of_little():
    assert mean_interval([]) == dict(value=None, low=None, high=None, n=0) and mean_interval([None, .5]) == dict(value=.5, low=None, high=None, n=1)

def test_the_bootstrap_agrees_with_scipys():
    x = np.random.default_rng(0).normal(.5, .1, (10, 1))
    ours = stratified_bootstrap(x, np.mean, reps=20_000)
    ref = stats.bootstrap((x[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours["low"] == pytest.approx(ref.low, abs=.002) and ours["high"] == pytest.approx(ref.high, abs=.002)

@quick
@given(st.lists(st.integers(0, 10).map(lambda i: i / 10), min_size=1, max_size=15), st.integers(1, 4))
def test_reaching_for_longer_is_never_earlier(ys, hold):
    xs = list(range(len(ys)))
    (a, ca), (b, cb) = first_reach(xs, ys, .5, hold), first_reach(xs, ys, .5, hold + 1)
    assert (not ca or cb) and a <= b
    if not ca: assert all(y >= .5 for y in ys[a:a + hold]) and len(ys[a:a + hold]) == hold

def result(arm, seed, curve, cold=(8, 10), world="standard-200", seconds=10.0, **kw):
    kind = world.split("-")[0]
    evals = [dict(step=i, tasks=16 * i, rollouts=128 * i, tokens=100 * i, seconds=seconds * i, split="val", mode="cold", temperature=1.0, acc_seen=y, acc_training_companies=y, acc_heldout=y / 2) for i, y in enumerate(curve)]
    cells = dict(cold={c: {str(l): dict(n=cold[1], solved=cold[0]) for l in range(1, 6)} for c in ("seen", "training", "heldout")})
    steps = dict(step=list(range(1, 11)), acc_by_position=[[.1, .6]] * 5 + [[.5, .6]] * 5, acc_cold=[.1] * 5 + [.5] * 5, acc_guided=[.6] * 10)
    return dict(purpose="confirmation", world=dict(name=world, kind=kind, seed=int(world.split("-")[1])), arm=arm, seed=seed, ceiling=dict(training=.7, training_known=.9, heldout=.8), evals=evals, cells=cells, steps=steps, wall_seconds=dict(train=3000.0, evaluate=600.0)) | kw

def test_numbers_read_from_a_result():
    r = result("fg_replay", 0, (.1, .3, .2, .35, .4, .6, .7))
    assert reach_of(r, "rollouts", .3) == (384, False) and reach_of(r, "rollouts", .3, hold=1) == (128, False) and reach_of(r, "seconds", .5) == (50.0, False)
    assert reach_of(r, "tasks", .7) == (96, True) and reach_of(r, "tokens", .3, "heldout") == (500, False) and reach_of({}, "tasks", .3) == (None, True)
    for i, e in enumerate(r["evals"]): e["trials"] = (0, 0, 100, 150, 150, 1000, 1000)[i]
    assert reach_of(r, "rollouts_and_trials", .3) == (384 + 150, False) and reach_of(r, "rollouts_and_trials", .9) == (768 + 1000, True)
    assert cold_rate(r) == .8 and cold_rate(r, levels=[7]) is None and cold_rate(r, mode="greedy") is None
    assert by_position(r, (1, 5)) == pytest.approx([.1, .6]) and by_position(r, (6, 10)) == pytest.approx([.5, .6]) and by_position(r, (90, 99)) == []
    assert guided_gap(r, (1, 5)) == pytest.approx(.5) and guided_gap(r, (6, 10)) == pytest.approx(.1) and guided_gap(r, (99, 99)) is None

def test_tables_pair_by_world_and_seed():
    rs = [result("a", s, (.1, .4, .4)) for s in range(3)] + [result("b", s, (.1, .1, .4), cold=(6, 10)) for s in (1, 2, 7)]
    assert paired(rs, "a", "b", cold_rate) == [(.8, .6)] * 2
    row = next(r for r in reach_table(rs) if (r["arm"], r["by"], r["threshold"]) == ("a", "rollouts", .3))
    assert (row["median"], row["censored"], row["reached"], row["runs"]) == (128.0, False, 3, 3)
    b = next(r for r in reach_table(rs) if (r["arm"], r["by"], r["threshold"]) == ("b", "rollouts", .3))
    assert (b["median"], b["censored"], b["reached"]) == (256, True, 0)
    t = ablation_table(rs, "a", ["b"])
    assert t[0]["n"] == 2 and t[0]["value"] == pytest.approx(-.2) and t[0]["p"] == t[0]["p_holm"] == .5
    assert arm_iqm([r for r in rs if r["arm"] == "a"], reps=50)["value"] == pytest.approx(.8) and iqm([.8]) == .8

PROTOCOL = dict(min_seeds=5, curve=dict(companies="training", hold=2), early_steps=[1, 5], late_steps=5)

def decide(rs, **c): return claims(rs, PROTOCOL | dict(criteria=[dict(id="x", group="g", text="t", ours="fg_replay", reference="dapo") | c]))[0]

OURS = [result("fg_replay", s, (.1, .4, .4, .6, .6, .6)) for s in range(5)]
CENSORED = [result("dapo", s, (.1,) * 11, cold=(2, 10)) for s in range(5)]
SLOW = [result("dapo", s, (.1, .1, .1, .1, .4 if s else .1, .4, .4), cold=(2, 10)) for s in range(5)]

@pytest.mark.parametrize("reference, at_least, expected", [
    (CENSORED, 10, dict(value=10.0, low=10.0, high=None, bound="at least", verdict="met")), # 1280 and more, over 128
    (CENSORED, 11, dict(value=10.0, bound="at least", verdict="not measured")), # A bound that is too low decides nothing
    (SLOW, 4, dict(bound=None, verdict="met")),
    (SLOW, 5, dict(bound=None, verdict="not met")),
    (SLOW[:4], 1, dict(n=4, verdict="not measured")), # Four pairs
    ([], 1, dict(value=None, n=0, verdict="not measured")),
])
def test_a_ratio_is_decided_by_pairs_and_bounds(reference, at_least, expected):
    r = decide(OURS + reference, measure="ratio", of="rollouts", to=.3, at_least=at_least, above=3)
    assert {k: pytest.approx(r[k]) if isinstance(r[k], float) else r[k] for k in expected} == expected

def test_a_ratio_of_uncensored_pairs_is_the_geometric_mean():
    r = decide(OURS + SLOW, measure="ratio", of="rollouts", to=.3, at_least=4, above=3)
    assert r["value"] == pytest.approx((5 * 4**4) ** .2) and 4 <= r["low"] <= r["value"] <= r["high"] <= 5 and r["note"] == "reached by 5 of 5 runs, by the reference 5"

def test_ours_censored_can_miss_and_never_meet():
    slow, fast = [result("fg_replay", s, (.1,) * 11) for s in range(5)], [result("dapo", s, (.1, .4, .4)) for s in range(5)]
    assert decide(slow + fast, measure="ratio", of="rollouts", to=.3, at_least=1, above=1)["verdict"] == "not met"
    assert decide(slow + CENSORED, measure="ratio", of="rollouts", to=.3, at_least=1, above=1)["verdict"] == "not measured"

@pytest.mark.parametrize("c, value, said", [
    (dict(measure="cold", companies="training", at_least=.8), .8, "met"),
    (dict(measure="cold", companies="training", at_least=.81), .8, "not met"),
    (dict(measure="cold", companies="heldout", of_ceiling=True, at_least=.9), 1.0, "met"),
    (dict(measure="cold", companies="training", levels=[5], at_least=.5), .8, "met"),
    (dict(measure="difference", companies="training", at_least=0, above=0), .6, "met"),
    (dict(measure="position_gain", at_least=.4), .5, "met"),
    (dict(measure="position_gain", at_least=.6), .5, "not met"),
    (dict(measure="gap_shrink", at_least=0, above=0), .4, "met"),
    (dict(measure="growth", at_least=0, above=0), .5, "met"),
    (dict(measure="overlap", companies="training"), .6, "not met"),
    (dict(measure="hours", cores=2, at_most=5), 5.0, "met"),
    (dict(measure="hours", cores=2, at_most=4.9), 5.0, "not met"),
    (dict(measure="nothing", why="there is one domain"), None, "not measured"),
    (dict(measure="difference", world="easy", companies="training", at_least=0), None, "not measured"),
])
def test_every_measure_by_hand(c, value, said):
    r = decide(OURS + CENSORED, **c)
    assert (r["value"] if value is None else pytest.approx(r["value"])) == value and r["verdict"] == said

def test_controls_that_overlap_bring_nothing():
    rng = np.random.default_rng(0)
    rs = [result(a, s, (.1, .1), cold=(int(rng.integers(4, 7)), 10)) for a in ("fg_replay", "dapo") for s in range(5)]
    assert decide(rs, measure="overlap", companies="training")["verdict"] == "met"
    assert decide(rs[:9], measure="overlap", companies="training")["verdict"] == "not measured"

def test_exploration_decides_nothing():
    with pytest.raises(ValueError, match="results of an exploration decide nothing"): decide([dict(r, purpose="exploration") for r in OURS], measure="growth", at_least=0)

def test_a_threshold_with_an_interval_of_its_own():
    assert [verdict(10, v, low, 5, above=3) for v, low in ((10, 3.1), (10, 3), (9.9, 5))] == ["met", "not met", "not met"]
    assert verdict(10, 9, 8, 5, "at least", above=3) == "not measured" and verdict(2, 3, 2, 2, min_seeds=2) == "met"

# The protocol

@pytest.mark.parametrize("change, words", [
    (dict(id="y", group="g", text="t", measure="speed"), "no measure 'speed'"),
    (dict(id="y", group="g", text="t", measure="cold"), "has no 'at_least'"),
    (dict(id="y", group="g", measure="cold", at_least=1), "has no 'text'"),
    (dict(id="y", group="g", text="t", measure="cold", at_least=1, treshold=2), "unknown key 'treshold'"),
])
def test_a_protocol_that_cannot_decide_is_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)): check_protocol(PROTOCOL | dict(criteria=[change]))

@pytest.mark.parametrize("part,groups", [("", {"issue", "minimum", "target", "stretch", "easy world"}), ("_2", {"issue", "target", "stretch"}), ("_3", {"issue", "easy world"}), ("_4", {"issue"}), ("_5", {"issue", "trials"})])
def test_the_protocol_quotes_its_criteria(part, groups):
    p = read_yaml((EXPERIMENTS / f"protocol{part}.yaml").read_text())
    check_protocol(p)
    assert criteria_markdown(p) in (EXPERIMENTS / "PROTOCOL.md").read_text(), "make the table anew with evaluation.metrics.criteria_markdown"
    arms = set(load_matrix(EXPERIMENTS / f"configs/matrix_confirm{part}.yaml").arms)
    assert {c[k] for c in p["criteria"] for k in ("ours", "reference") if k in c} <= arms
    assert {c["group"] for c in p["criteria"]} == groups

@pytest.mark.parametrize("part,kinds,new", [("_2", ["standard"], []), ("_3", ["standard", "easy"], []), ("_4", ["standard"], ["foreign_is_control"]), ("_5", ["standard"], ["dapo_50_trials", "control_50_trials"])])
def test_a_later_confirmation_decides_with_the_numbers_of_the_first_in_worlds_of_its_own(part, kinds, new):
    first, later = (read_yaml((EXPERIMENTS / f"protocol{p}.yaml").read_text()) for p in ("", part))
    for rules in (first, later): rules["criteria"] = [{k: v for k, v in c.items() if k != "withdrawn"} for c in rules["criteria"]] # What was said of a criterion afterwards
    ids = [c["id"] for c in later["criteria"]]
    assert [c for c in later["criteria"] if c["id"] not in new] == [c for c in first["criteria"] if c["id"] in ids] and [i for i in ids if i not in {c["id"] for c in first["criteria"]}] == new and all(later[k] == first[k] for k in ("min_seeds", "curve", "early_steps", "late_steps"))
    asked_before = next(c for c in first["criteria"] if c["id"] == "shuffled_is_control")
    for c in later["criteria"]:
        if c["id"] == "foreign_is_control": assert {k: c[k] for k in ("group", "measure", "companies", "reference")} == {k: asked_before[k] for k in ("group", "measure", "companies", "reference")}
        if c["id"].endswith("_trials"):
            like = next(x for x in first["criteria"] if x["id"] == c["id"].removesuffix("_trials"))
            assert {k: c[k] for k in ("measure", "to", "ours", "reference")} == {k: like[k] for k in ("measure", "to", "ours", "reference")} and c["of"] == "rollouts_and_trials" and c["at_least"] == c["above"] == 1
    a, b = (load_matrix(EXPERIMENTS / f"configs/matrix_confirm{p}.yaml") for p in ("", part))
    others = {w.seed for p in {"", "_2", "_3", "_4", "_5"} - {part} for w in load_matrix(EXPERIMENTS / f"configs/matrix_confirm{p}.yaml").worlds}
    assert a.seeds == b.seeds and a.eval_tasks == b.eval_tasks and not others & {w.seed for w in b.worlds} and [w.kind for w in b.worlds] == kinds
    text = (EXPERIMENTS / "PROTOCOL.md").read_text()
    for steps in [{k: c.train.steps for k, c in b.arms.items()}] + [{a: w.own.get(a, {}).get("train", {}).get("steps", b.arms[a].train.steps) for a in w.arms} for w in b.worlds]:
        assert ", ".join(f"`{k}` {n}" for k, n in steps.items()) in text, f"the steps of matrix_confirm{part}.yaml"

def test_the_protocols_thresholds_are_the_issues():
    c = {x["id"]: x for x in read_yaml((EXPERIMENTS / "protocol.yaml").read_text())["criteria"]}
    assert {k: (c[k]["at_least"], c[k]["above"]) for k in ("dapo_30", "dapo_50", "control_30", "control_50")} == dict(dapo_30=(10, 3), dapo_50=(5, 3), control_30=(5, 1.5), control_50=(2.2, 1.5))
    for k in ("dapo_30", "dapo_50", "control_30", "control_50"): assert c[f"observed_{k}"]["at_least"] == c[k]["at_least"] / 2 and c[f"observed_{k}"]["ours"] == "fg_observed"
    assert [c[f"level_{i}"]["at_least"] for i in range(1, 6)] == [.9, .9, .9, .6, .5] and c["cold_seen"]["at_least"] == c["cold_training"]["at_least"] == c["cold_heldout"]["at_least"] == .9 and c["cold_training"]["of_ceiling"] and c["cold_heldout"]["of_ceiling"]
    assert not c["cold_seen"].get("of_ceiling")
    assert c["position_8"]["at_least"] == .4 and c["two_hours"]["at_most"] == 2 and [c[f"plan_{n}x"]["at_least"] for n in (2, 5, 10)] == [2, 5, 10]

def test_the_budgets_of_the_protocol_are_those_of_the_matrix():
    text, m = (EXPERIMENTS / "PROTOCOL.md").read_text(), load_matrix(EXPERIMENTS / "configs/matrix_confirm.yaml")
    told = {a: tuple(map(int, row[1:3])) for line in text.splitlines() if (row := [x.strip() for x in line.strip("|").split("|")])[0].startswith("`") and len(row) == 5
        for a in re.findall(r"`(\w+)`", row[0])}
    assert told == {a: (c.train.steps, c.train.tasks_per_step) for a, c in m.arms.items()}
    easy = next(w for w in m.worlds if w.kind == "easy")
    steps = {a: v["train"]["steps"] for a, v in easy.own.items()}
    assert "In the easy world `dapo` has {dapo} steps, the control {dapo_replay} and ours {fg_replay}.".format(**steps) in text and f"first {m.eval_tasks} tasks" in text and "to be fixed" not in text

def test_the_report_shows_every_criterion():
    p = read_yaml((EXPERIMENTS / "protocol.yaml").read_text())
    table = claims_table(claims(OURS + CENSORED, p))
    assert len(table.rows) == len(p["criteria"])
    by_text = {r[1]: r for r in table.rows}
    row = by_text["FG + transfer against DAPO: rollouts to 30% cold start"]
    assert row[2:] == ("at least 10, interval above 3", "at least 10.0× (from 10.0); reached by 5 of 5 runs, by the reference 0", "5", "met")
    assert by_text["Works in other tool-use domains"][3:] == ("–; there is one domain here", "0", "not measured")

def test_a_new_setting_leaves_results_alone_and_a_new_default_does_not():
    defaults = hashlib.sha256(json.dumps(RunConfig().model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:8]
    assert (matrix.DEFAULTS, defaults) == (1, "992ef247"), "a setting is new, or its default changed: in the second case raise matrix.DEFAULTS; then write both here"
    a, b = (load_config(None, [x]) for x in ("train.steps=40", "train.steps=41"))
    assert matrix.settings_digest(a, "w", "p", {}) == matrix.settings_digest(RunConfig(), "w", "p", {}) != matrix.settings_digest(b, "w", "p", {})
