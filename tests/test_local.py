"The local engine: what it samples, what it trains on, and that nothing is lost when it is stopped."
import os, resource, signal, subprocess, sys, time
from collections import Counter

import pytest
import torch

from fg_dapo.agent.scripted import best_plan
from fg_dapo.config import load_config
from fg_dapo.core import read_json, read_jsonl, rng_for
from fg_dapo.engines.local import Trainer, checkpoints, collect, forward_logp, make_sampler, policy_gradient, replay_updates, task_order, to_entry, train
from fg_dapo.engines.sampler import Job, PromptTooLong
from fg_dapo.method.replay import plan_entry
from fg_dapo.policy import encode, nll, pad_rows, transcribe

from conftest import ROOT

CLI = [sys.executable, "-m", "fg_dapo.cli"]
ENV = dict(os.environ, PYTHONPATH=str(ROOT))

def entry_of(s, feedback="", lacks=()): return plan_entry(s.task.id, best_plan(s), lacks, feedback)

def ledger(run): return {k: v for k, v in read_json(checkpoints(run)[-1] / "state.json")["ledger"].items() if k != "seconds"}

def set_args(overrides): return [x for o in overrides for x in ("--set", o)]

def test_every_epoch_takes_each_task_once():
    epoch = task_order(50, 3, 0, 50)
    assert sorted(epoch) == list(range(50)) and epoch != list(range(50))
    assert task_order(50, 3, 0, 30) + task_order(50, 3, 30, 40) == task_order(50, 3, 0, 70)
    assert task_order(50, 3, 50, 50) != epoch and sorted(task_order(50, 3, 50, 50)) == list(range(50))

def test_feedback_in_a_prompt_is_that_of_earlier_failures_of_its_own_group(small, tmp_path):
    t = Trainer(load_config(None, [*small, "train.rollouts=8"]), tmp_path / "r")
    samples = collect(t.sampler, t.scenarios[:4], t.config, 0)
    assert Counter(s.group for s in samples) == {i: 8 for i in range(4)}
    own = {(s.group, s.position): s.result["feedback"] for s in samples}
    waves = [range(0, 2), range(2, 4), range(4, 8)]
    for s in samples:
        shown = s.rollout.job.feedback
        if s.position < 2: assert shown == "" and not s.guided
        else:
            assert s.guided and "<|feedback|> " + shown in s.rollout.transcript.prompt
            first = next(w.start for w in waves if s.position in w)
            for line in shown.split("\n"):
                attempt, text = line.split(": ", 1)
                assert int(attempt) - 1 < first and own[s.group, int(attempt) - 1].endswith(text)

def test_clean_groups_read_nothing_and_the_ledger_counts_everything(small, tmp_path):
    c = load_config(None, [*small, "algorithm.feedback_guidance.enable=false", "train.steps=2"])
    rows = read_jsonl(train(c, tmp_path / "r", progress=False).parents[1] / "metrics.jsonl")
    for i, r in enumerate(rows, 1):
        assert r["ledger"]["rollouts_guided"] == 0 and r["ledger"]["rollouts"] == i * 2 * 4 and r["tasks"] == i * 2
        assert r["acc_guided"] is None and len(r["acc_by_position"]) == 4

def test_sampled_logp_is_the_models_own(small, tmp_path):
    t = Trainer(load_config(None, small), tmp_path / "r")
    roll = [s.rollout for s in collect(t.sampler, t.scenarios[:3], t.config, 0)]
    with torch.no_grad(): logp, mask, _ = forward_logp(t.model, [r.ids for r in roll], [r.mask for r in roll], t.tok.pad_token_id)
    old = pad_rows([r.logp for r in roll], 0.0)[:, 1:]
    assert mask.sum() == sum(r.tokens for r in roll)
    assert ((logp - old) * mask).abs().max() < 1e-4

def test_greedy_sampling_takes_the_likeliest_token(small, tmp_path, world):
    t = Trainer(load_config(None, small), tmp_path / "r")
    out = make_sampler(t.model, t.tok, world, t.config, 0.0).run([Job(s) for s in t.scenarios[:3]])
    for r in out:
        best = t.model(torch.tensor([r.ids])).logits[0, :-1].argmax(-1).tolist()
        assert all(b == i for b, i, m in zip(best, r.ids[1:], r.mask[1:]) if m)

def test_policy_gradient_follows_the_advantage(small, tmp_path):
    t = Trainer(load_config(None, [*small, "algorithm.updates=1", "algorithm.advantage_from=acc"]), tmp_path / "r")
    samples = collect(t.sampler, t.scenarios[:1], t.config, 0)
    rows = [s.rollout for s in samples]
    def total(r):
        with torch.no_grad(): logp, mask, _ = forward_logp(t.model, [r.ids], [r.mask], t.tok.pad_token_id)
        return float((logp * mask).sum())
    log, kept = policy_gradient(t.model, t.opt, samples, t.config, t.tok.pad_token_id)
    assert log["updates"] == 0 and not any(kept) # All failed: the group has no deviation and is dropped
    samples[0].result["acc"] = 1.0
    before = [total(r) for r in rows]
    log, kept = policy_gradient(t.model, t.opt, samples, t.config, t.tok.pad_token_id)
    assert log["updates"] == 1 and all(kept) and log["groups_kept"] == 1
    assert abs(log["approx_kl"]) < 1e-4 and log["clip_frac"] == 0.0 # On policy, the ratio is 1
    assert total(rows[0]) > before[0]

def test_replay_rows_are_plain_fresh_and_sometimes_under_another_name(small, tmp_path):
    c = load_config(None, [*small, "algorithm.transfer.name_dropout=0.5", "algorithm.transfer.guided_rows=0.25"])
    t = Trainer(c, tmp_path / "r")
    s = next(s for s in t.scenarios if s.task.level == 3)
    t.replayer.buffer.add(entry_of(s, feedback="1: Billing wants: pin."))
    rows = t.replayer.rows(rng_for(0, "t"), 200)
    assert len(rows) == 200 == t.replayer.reexecuted
    guided, other = [("<|feedback|>" in r.prompt) for r in rows], [s.company.name not in str(r) for r in rows]
    assert 25 < sum(guided) < 75 and 70 < sum(other) < 130
    assert len({str(r) for r in rows}) > 190 # Fresh users
    assert all(r.turns[-1][0].startswith("call ") for r in rows)

def test_replay_without_reexecution_keeps_what_was_written(small, tmp_path):
    c = load_config(None, [*small, "algorithm.transfer.reexecute=false", "algorithm.transfer.name_dropout=0.0", "algorithm.transfer.guided_rows=0.0"])
    t = Trainer(c, tmp_path / "r")
    s = collect(t.sampler, t.scenarios[:1], c, 0)[-1]
    t.replayer.buffer.add(to_entry(s, reexecute=False))
    [row] = t.replayer.rows(rng_for(0, "t"), 1)
    assert s.guided and "<|feedback|>" not in row.prompt and row.turns == s.rollout.transcript.turns and t.replayer.reexecuted == 0

def test_a_told_ending_is_replayed_with_a_user_who_lacks_the_field(small, tmp_path):
    t = Trainer(load_config(None, small), tmp_path / "r")
    s = next(s for s in t.scenarios if s.task.ground_truth.ending == "tell_user")
    t.replayer.buffer.add(entry_of(s, lacks=s.task.ground_truth.missing))
    rows = t.replayer.rows(rng_for(0, "t"), 20)
    assert rows and all(r.turns[-1][0].startswith("tell ") for r in rows)

def test_replay_teaches(small, tmp_path):
    t = Trainer(load_config(None, [*small, "algorithm.transfer.updates=5", "algorithm.transfer.rows=8", "algorithm.transfer.warmup_steps=0"]), tmp_path / "r")
    s = t.scenarios[0]
    t.replayer.buffer.add(entry_of(s))
    ids, mask = encode(t.tok, transcribe(best_plan(s), s, t.sampler.chat)[1])
    def loss():
        with torch.no_grad(): return float(nll(t.model, torch.tensor([ids]), torch.tensor([mask])))
    before = loss()
    log = replay_updates(t.model, t.opt, t.replayer, t.tok, 0, 0)
    assert log["updates"] == 5 and loss() < before - 0.1

def test_a_prompt_over_the_limit_is_refused_with_the_numbers(small, tmp_path):
    t = Trainer(load_config(None, [*small, "limits.max_prompt_tokens=24", "algorithm.feedback_guidance.max_feedback_tokens=8"]), tmp_path / "r")
    with pytest.raises(PromptTooLong, match=r"the limit is 24"): t.sampler.run([Job(t.scenarios[0], feedback="Billing wants pin. " * 20)])

def test_killed_and_interrupted_runs_resume_with_the_ledger_of_an_unbroken_one(small, tmp_path):
    straight = tmp_path / "straight"
    train(load_config(None, [*small, "train.steps=4"]), straight, progress=False)
    for how, code in (signal.SIGKILL, -9), (signal.SIGINT, 130):
        run = tmp_path / how.name
        command = [*CLI, "train", "--out", str(run), *set_args([*small, "train.steps=4"])]
        p = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until = time.time() + 120
        while not list((run / "checkpoints").glob("step-*/state.json")) and time.time() < until and p.poll() is None: time.sleep(0.02)
        p.send_signal(how)
        said = p.communicate(timeout=120)[0]
        assert p.returncode == code, said
        if how == signal.SIGINT: assert "resume" in said and "Traceback" not in said
        with open(run / "metrics.jsonl", "a") as f: f.write('{"step": 99}\n{"step": 1') # A step that never counted, and half a line
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        from fg_dapo.core import RunDir
        assert ledger(RunDir(run)) == ledger(RunDir(straight))
        assert [r["step"] for r in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]
        assert (checkpoints(RunDir(run))[-1] / "model.safetensors").read_bytes() == (checkpoints(RunDir(straight))[-1] / "model.safetensors").read_bytes()

def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(small, tmp_path):
    run = tmp_path / "r"
    command = [*CLI, "train", "--out", str(run), *set_args(small)]
    first = subprocess.run([*command, "--set", "train.steps=3"], env=ENV, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stderr
    from fg_dapo.core import RunDir
    for c in checkpoints(RunDir(run))[1:]:
        for f in c.iterdir(): f.unlink()
        c.rmdir()
    kept = checkpoints(RunDir(run))[0]
    before = (kept / "model.safetensors").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)) # The system refuses to write more, as a full disk does
    second = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, preexec_fn=limit)
    assert second.returncode == 1 and "could not write the checkpoint" in second.stderr and "Traceback" not in second.stderr
    assert (kept / "model.safetensors").read_bytes() == before and checkpoints(RunDir(run)) == [kept]
    assert not list((run / "checkpoints").glob(".step-*"))
    again = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr

@pytest.mark.parametrize("override, says", [("policy.checkpoint=nowhere", "fg-dapo warmstart"), ("train.stepz=3", "train.steps"), ("train.rollouts=1", "train.rollouts"), ("data.folder=nowhere", "fg-dapo data")])
def test_what_cannot_run_is_refused_before_it_starts(small, tmp_path, override, says):
    p = subprocess.run([*CLI, "train", "--out", str(tmp_path / "r"), *set_args([*small, override])], env=ENV, capture_output=True, text=True, timeout=120)
    assert p.returncode == 1 and says in p.stderr and "Traceback" not in p.stderr and not (tmp_path / "r").exists()

def test_a_folder_with_another_run_is_refused(small, tmp_path):
    train(load_config(None, [*small, "train.steps=1"]), tmp_path / "r", progress=False)
    with pytest.raises(ValueError, match="other settings"): Trainer(load_config(None, [*small, "train.steps=1", "algorithm.lr=0.01"]), tmp_path / "r")

def test_optimizer_and_buffer_survive_a_checkpoint(small, tmp_path):
    t = Trainer(load_config(None, small), tmp_path / "r")
    t.replayer.buffer.add(entry_of(t.scenarios[0]))
    replay_updates(t.model, t.opt, t.replayer, t.tok, 0, 0)
    t.step = 1
    t.save()
    u = Trainer(load_config(None, small), tmp_path / "r")
    assert u.step == 1 and u.replayer.buffer.state_dict() == t.replayer.buffer.state_dict()
    a, b = t.opt.state_dict()["state"], u.opt.state_dict()["state"]
    assert a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    assert all(torch.equal(x, y) for x, y in zip(t.model.state_dict().values(), u.model.state_dict().values()))
