"""The verl engine when something dies: real processes are killed in one run on a CPU, which is taken up again each time.

A start takes most of a minute, so the tests share a folder: each goes on from where the one before left it, in the order of the file.
Every fault is made from outside, by signals; only the tool that raises is a module imported by the run's own processes.
"""
import json, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM's CPU build is for Linux")
pytest.importorskip("verl")
import psutil, torch

from fg_dapo.config import load_config
from fg_dapo.core import read_json, read_jsonl
from fg_dapo.engines import verl_launch
from fg_dapo.engines.processes import end_session, session_of, shared_memory
from fg_dapo.engines.verl_launch import VerlError, last_step, policy_folder, train
from fg_dapo.policy import load_policy

ROOT = Path(__file__).parents[1]
PYTHON, STEPS, STALL = sys.executable, 6, 30
START, ERROR = 420, 90 # Seconds, on a machine that does other things too
SETTINGS = [f"policy.checkpoint={ROOT / 'data/tiny'}", f"data.folder={ROOT / 'data'}", f"train.steps={STEPS}", "train.tasks_per_step=2", "train.rollouts=4", "train.checkpoint_every=1", "train.eval_every=0",
    "train.sample_groups=99", "hardware.gpus_per_node=1", "algorithm.transfer.updates=1", f"hardware.stall_seconds={STALL}"]
DEAD_LINE = "159" # The phone is broken in tasks whose number ends so
FAULTS = f"""
from fg_dapo.agent.episode import Episode
act = Episode.act
def broken(self, turn):
    if self.scenario.task.id[-1] in "{DEAD_LINE}" and any(c.name == "make_phone_call" for c in turn.calls): raise OSError("the line is dead")
    return act(self, turn)
Episode.act = broken
"""

def title(p):
    try: return " ".join(p.cmdline())
    except psutil.Error: return ""

class Launch:
    "`fg-dapo train` in a process of its own; nothing of it outlives the `with`."
    def __init__(self, out): self.out, self.said, self.leader = out, out.parent / "said.txt", None
    def __enter__(self):
        (self.out.parent / "faults.py").write_text(FAULTS)
        env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(self.out.parent), str(ROOT)]), VERL_USE_EXTERNAL_MODULES="fg_dapo.engines.verl_cpu,faults", PYTHONUNBUFFERED="1")
        sets = [x for s in SETTINGS for x in ("--set", s)]
        with open(self.said, "w") as f:
            self.process = subprocess.Popen([sys.executable, "-m", "fg_dapo.cli", "train", "-c", str(ROOT / "experiments/configs/verl_cpu.yaml"), "--out", str(self.out), *sets], cwd=ROOT, env=env, stdout=f, stderr=f, start_new_session=True)
        self.leader = self.until(self._leader, 60, "a child")
        return self
    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        if self.leader: end_session(self.leader)
    def _leader(self):
        return next((p.pid for p in psutil.Process(self.process.pid).children() if "verl import main" in title(p) and os.getsid(p.pid) == p.pid), None)
    def until(self, what, limit, name):
        "Wait for something; the run must not end before."
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if found := what(): return found
            assert self.process.poll() is None, f"ended while waiting for {name}: {self.text()}"
            time.sleep(0.05)
        pytest.fail(f"no {name} within {limit} s: {self.text()}")
    def beat(self):
        try: return read_json(self.out / "heartbeat.json")
        except (OSError, ValueError): return dict(step=0, stage="", ready=False)
    def updating(self):
        "Wait for the update of the step that is being sampled."
        self.until(lambda: self.beat()["stage"].startswith(("policy gradient", "replay")), START, "update")
    def sampling(self, steps):
        "Wait until so many steps were done and saved, and the rollouts of the next are in flight."
        goal = last_step(self.out) + steps
        self.until(lambda: last_step(self.out) >= goal and self.beat()["step"] > goal and self.beat()["stage"].startswith("sampling (train): 0 of") and goal + 1, START, f"step {goal}")
        self.segments = shared_memory(self.all())
        assert len(self.all()) > 10
        return goal + 1
    def all(self): return session_of(self.leader)
    def strike(self, pattern, sig=signal.SIGKILL):
        "Send a signal to one process of the run."
        hit = [p for p in self.all() if re.search(pattern, title(p))]
        assert hit, f"no {pattern} among {sorted(map(title, self.all()))}"
        hit[0].send_signal(sig)
        return time.monotonic()
    def end(self, since, limit=ERROR):
        "Exit code and output of the run, which must end in time and leave nothing."
        code = self.process.wait(limit)
        seconds = time.monotonic() - since
        print(f"{seconds:.1f} s until exit code {code}")
        self.gone(5)
        return code, self.text()
    def gone(self, limit):
        end = time.monotonic() + limit
        while (left := self.all()) and time.monotonic() < end: time.sleep(0.1)
        assert not left, sorted(map(title, left))
        while (held := [f for f in self.segments if f.exists()]) and time.monotonic() < end: time.sleep(0.1)
        assert not held
    def text(self): return self.said.read_text().replace("\r", "\n")[-2000:]
    def failed(self, since, step, *words, limit=ERROR, saved=None):
        "The run ended with an error that says what, where, and how to go on."
        code, said = self.end(since, limit)
        error = said[said.rindex("error: "):]
        print(error)
        assert code == 1 and error.count("\n") == 1 and len(error) < 700
        for w in (*words, f"at step {step}, ", f"the log is {self.out / 'log.txt'}", f"the last checkpoint is of step {step - 1 if saved is None else saved}, and the same command goes on from it"): assert w in error, (w, error)
        books(self.out)

def books(out):
    "What the files of a run say of each other, as of its last checkpoint."
    last = last_step(out)
    metrics = [m for m in read_jsonl(out / "metrics.jsonl", torn_tail=True) if m["step"] <= last]
    rows = [r for r in read_jsonl(out / "rollouts.jsonl", torn_tail=True) if r["step"] <= last]
    assert [m["step"] for m in metrics] == list(range(1, last + 1)) and [m["tasks"] for m in metrics] == [2 * s for s in range(1, last + 1)]
    ledger = read_json(out / f"checkpoints/global_step_{last}/fg_dapo.json")["ledger"]
    assert ledger == metrics[-1]["ledger"]
    assert ledger["rollouts"] == metrics[-1]["rollouts"] == len(rows) == 8 * last == 4 * sum(m["groups"] for m in metrics)
    assert ledger["rollouts_guided"] == sum(r["guided"] for r in rows) and ledger["rollouts_cold"] == sum(not r["guided"] for r in rows)
    assert ledger["rollouts_filtered"] == 4 * sum(m["groups"] - m["groups_kept"] for m in metrics)
    assert ledger["rollouts_failed"] == sum(r["error"] is not None for r in rows)
    assert ledger["tokens"] == sum(r["tokens"] for r in rows) == round(sum(8 * m["response_tokens_mean"] for m in metrics))
    assert ledger["updates"] == sum(m["updates"] + (m["replay_loss"] is not None) for m in metrics)
    assert math.isclose(ledger["seconds"], sum(sum(m["seconds"].values()) for m in metrics), rel_tol=1e-6)
    return metrics, rows

@pytest.fixture(scope="module")
def out(tmp_path_factory): return tmp_path_factory.mktemp("faults") / "run"

# Without Ray: what the starter itself sees

@pytest.fixture
def instead(tmp_path, monkeypatch):
    "Start a shell command in place of verl."
    def start(command, stall, start_up):
        fake = tmp_path / "python"
        fake.write_text(f'#!/bin/sh\ncase "$2" in *"verl import main"*) {command};; *) exec {PYTHON} "$@";; esac\n')
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))
        monkeypatch.setattr(verl_launch, "START_UP", start_up)
        monkeypatch.setattr(verl_launch, "GRACE", 1)
        return lambda: train(load_config(ROOT / "experiments/configs/verl_cpu.yaml", [*SETTINGS, f"hardware.stall_seconds={stall}"]), tmp_path / "run", progress=False)
    return start

def test_a_slow_start_is_no_stall(instead, tmp_path):
    run = instead("echo 'ValueError: no such model'; sleep 3; exit 3", stall=1, start_up=20)
    with pytest.raises(VerlError, match=r"^the trainer ended with code 3: ValueError: no such model; this was at step 0, starting; .* there is no checkpoint yet, and the same command begins anew$"): run()
    with pytest.raises(VerlError, match="^the trainer ended with code 4; this was"): instead("exit 4", stall=1, start_up=20)() # Not what the log said the last time
    with pytest.raises(VerlError, match=r"^the process that holds Ray was killed \(SIGKILL\); this was"): instead("kill -9 $$", stall=1, start_up=20)()

def test_a_start_that_hangs_is_ended(instead, tmp_path):
    run = instead(f"setsid sleep 1; (trap '' TERM; sleep 600; sleep 600) & echo $$ > {tmp_path}/leader; trap '' TERM; sleep 600; sleep 600", stall=1, start_up=3)
    before = time.monotonic()
    with pytest.raises(VerlError, match=r"^nothing has moved for \d s \(hardware.stall_seconds\), and the run was stopped; this was at step 0, starting"): run()
    assert 3 < time.monotonic() - before < 30
    assert session_of(int((tmp_path / "leader").read_text())) == []

def test_a_trainer_that_hangs_is_ended(instead, tmp_path):
    beat = dict(step=3, stage="weight synchronisation", ready=True, time=time.time())
    run = instead(f"echo '{json.dumps(beat)}' > {tmp_path}/run/heartbeat.json; sleep 600; sleep 600", stall=2, start_up=600)
    with pytest.raises(VerlError, match=r"^nothing has moved for \d s \(hardware.stall_seconds\), and the run was stopped; this was at step 3, weight synchronisation; "): run()

# One run, and what may happen to it

def test_a_second_signal_during_the_start_stops_at_once(out):
    with Launch(out) as run:
        run.segments = set()
        run.until(lambda: len(run.all()) > 8, START, "Ray")
        run.process.send_signal(signal.SIGTERM)
        run.until(lambda: "press Ctrl-C again to stop at once" in run.text(), 10, "an answer")
        since = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        code, said = run.end(since, 60)
    assert code == 130 and "stopped; run the same command to resume" in said and last_step(out) == 0

def test_ctrl_c_finishes_the_step_and_saves(out):
    with Launch(out) as run:
        run.sampling(0)
        since = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        code, said = run.end(since)
    assert code == 130 and said.endswith("stopped; run the same command to resume\n") and last_step(out) == 1
    books(out)

def test_a_dead_agent_loop_worker_ends_the_run_with_an_error(out):
    with Launch(out) as run:
        step = run.sampling(1)
        run.failed(run.strike("ray::GuidedWorker"), step, "agent-loop worker 0 is gone", "sampling (train)")

def test_a_dead_server_ends_the_run_with_an_error(out):
    with Launch(out) as run:
        step = run.sampling(1)
        run.failed(run.strike("ray::vLLMHttpServer"), step, "vLLMHttpServer (process ", " died: killed, or out of memory", "sampling (train)")

def test_a_dead_trainer_ends_the_run_with_an_error(out):
    with Launch(out) as run:
        step = run.sampling(1)
        run.failed(run.strike("ray::(Runner|TaskRunnerV1)"), step, "the trainer: TaskRunnerV1 (process ", " died: killed, or out of memory", "sampling (train)")

def test_nothing_outlives_a_killed_starter(out):
    with Launch(out) as run:
        run.sampling(0)
        since = time.monotonic()
        run.process.kill()
        run.process.wait()
        run.gone(30)
        print(f"{time.monotonic() - since:.1f} s until the last process was gone")
    books(out)

def test_a_server_that_hangs_ends_the_run_with_an_error(out):
    with Launch(out) as run:
        step = run.sampling(0)
        run.updating()
        since = run.strike("VLLM::EngineCore", signal.SIGSTOP) # The synchronisation of weights would wait for it for ever
        run.failed(since, step, f"has not answered for {STALL} s (hardware.stall_seconds)", "asking the servers", limit=STALL + ERROR, saved=step)
        assert time.monotonic() - since > STALL

def test_the_run_reaches_its_end_and_its_books_agree(out):
    with Launch(out) as run:
        run.sampling(0)
        code, said = run.end(time.monotonic(), START)
    assert code == 0 and said.rstrip().endswith(f"done: {policy_folder(out)}"), said
    assert last_step(out) == STEPS
    metrics, rows = books(out)
    assert len(read_jsonl(out / "metrics.jsonl")) == STEPS and len(read_jsonl(out / "rollouts.jsonl")) == len(rows) == 8 * STEPS
    assert len({r["task_id"] for r in rows}) == 2 * STEPS # Each resume took the next tasks
    assert max(m["rollout_probs_diff_max"] for m in metrics) < 1e-4 # And sampled with the weights it went on from
    a, b = (load_policy(p)[0].state_dict() for p in (ROOT / "data/tiny", policy_folder(out)))
    assert a.keys() == b.keys() and all(torch.isfinite(x).all() for x in b.values()) and max(float((a[k] - b[k]).abs().max()) for k in a) > 1e-3

def test_a_tool_that_raises_costs_its_rollout_and_no_more(out):
    metrics, rows = books(out)
    broken = [r for r in rows if r["error"]]
    assert broken and all(r["task_id"][-1] in DEAD_LINE for r in broken)
    for r in rows:
        if r["error"]: assert (r["error"], r["score"], r["acc"], r["failure"], r["feedback"]) == ("OSError: the line is dead", 0.0, 0.0, "error", None)
        else: assert (r["feedback"] is None) == (r["acc"] >= 1) and 0 <= r["score"] <= 1
    groups = {}
    for r in rows: groups.setdefault((r["step"], r["group"]), []).append(r)
    assert len(groups) == 2 * STEPS and all(sorted(r["position"] for r in g) == [0, 1, 2, 3] for g in groups.values())
    for m in metrics:
        kept = [len({r["acc"] for r in groups[m["step"], i]}) > 1 for i in (0, 1)]
        assert m["groups_kept"] == sum(kept) and (m["updates"] > 0) == any(kept)
