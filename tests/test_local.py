"The local engine: what it samples, what it trains on, and that nothing is lost when it is stopped."
import os, resource, signal, subprocess, sys, time
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fg_dapo.agent.chat import agent_turns, chat_format
from fg_dapo.agent.scripted import best_plan, follow, play
from fg_dapo.config import ConfigError, TransferConfig, load_config
from fg_dapo.core import read_json, read_jsonl, rng_for
from fg_dapo.engines import local
from fg_dapo.engines.local import Trainer, checkpoints, collect, forward_logp, judge, make_sampler, pieces, policy_gradient, replay_count, replay_lr, replay_updates, row_loss, sample_step, task_order, thinned, to_entry, train, training_rows
from fg_dapo.engines.sampler import Job, PromptTooLong
from fg_dapo.method.replay import TRIES, entry_plan, for_user, likely_plans, plan_counts, plan_entry, told_fields, wider
from fg_dapo.policy import encode, new_policy, nll, pad_rows, save_policy, set_lr, train_tokenizer, transcribe
from fg_dapo.world.generate import generate_world, random_user

from conftest import ROOT

CLI = [sys.executable, "-m", "fg_dapo.cli"]
ENV = dict(os.environ, PYTHONPATH=str(ROOT))

WORLD = generate_world(1)

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
    log, kept = policy_gradient(t.model, t.opt, samples, t.config, t.tok)
    assert log["updates"] == 0 and not any(kept) # All failed: the group has no deviation and is dropped
    samples[0].result["acc"] = 1.0
    before = [total(r) for r in rows]
    log, kept = policy_gradient(t.model, t.opt, samples, t.config, t.tok)
    assert log["updates"] == 1 and all(kept) and log["groups_kept"] == 1
    assert abs(log["approx_kl"]) < 1e-4 and log["clip_frac"] == 0.0 # On policy, the ratio is 1
    assert total(rows[0]) > before[0]

def turns_of(r):
    "The policy's turns of a rollout: where each begins and ends in its ids."
    edges = [i for i in range(1, len(r.mask)) if r.mask[i] != r.mask[i - 1]] + ([len(r.mask)] if r.mask[-1] else [])
    return list(zip(edges[::2], edges[1::2]))

@pytest.mark.parametrize("length", [512, 14])
def test_a_dialogue_that_hears_the_same_turns_is_the_same_rollout(small, tmp_path, length):
    "What another engine gets out of `Dialogue`, turn by turn, is what the sampler made of it."
    t = Trainer(load_config(None, [*small, f"limits.max_response_tokens={length}"]), tmp_path / "r")
    rollouts = [s.rollout for s in collect(t.sampler, t.scenarios[:4], t.config, 0)]
    for r in rollouts:
        d = t.sampler.dialogue(r.job)
        for begin, end in turns_of(r):
            assert begin == len(d.ids) and end - begin <= d.room <= 12 and not d.done
            answer = d.hear(r.ids[begin:end], r.logp[begin:end])
            assert d.ids[end:] == answer and bool(answer) != d.done
        again = d.rollout()
        assert d.done and (again.ids, again.mask, again.logp, again.transcript, again.truncated) == (r.ids, r.mask, r.logp, r.transcript, r.truncated)
    assert any(r.truncated for r in rollouts)

def make_mixed(samples):
    "Rewards by hand. Group 0: cold and guided rows differ; 1: only guided rows; 2: none do; 3: only cold rows."
    for s in samples: s.result["acc"] = s.result["score"] = float(s.position in {0: (1, 2, 5), 1: (4,), 2: (), 3: (0,)}[s.group])
    return samples

def test_stripped_rows_and_their_loss_by_hand(small, tmp_path):
    c = load_config(None, [*small, "train.rollouts=8", "algorithm.transfer.mode=strip", "algorithm.transfer.weight_cap=1.01", "algorithm.updates=1"])
    t = Trainer(c, tmp_path / "r")
    samples = make_mixed(collect(t.sampler, t.scenarios[:4], c, 0))
    rows = training_rows(samples, c, t.model, t.tok)
    sampled, plain, guided = rows[:24], rows[24:], [s for s in samples if s.guided and s.group != 2]
    assert [(r.ids, r.logp, r.weight) for r in sampled] == [(s.rollout.ids, s.rollout.logp, None) for s in samples if s.group != 2]
    assert len(plain) == 18 == len(guided) and Counter(r.group for r in plain) == {0: 6, 1: 6, 3: 6}
    advantage = {(s.group, s.position): a for s, a in zip(samples, judge(samples, c)[0].tolist())}
    objective = sum(r.adv * r.tokens for r in sampled)
    for row, s in zip(plain, guided):
        r, prompt = s.rollout, t.sampler.encode(t.sampler.chat.prompt(s.rollout.job.scenario.task.request))
        begin = r.mask.index(1)
        assert row.ids == prompt + r.ids[begin:] and row.mask == [0] * len(prompt) + r.mask[begin:] # The sampled ids, not the text read again
        assert row.adv == advantage[s.group, s.position]
        with torch.no_grad(): logits = t.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for i in range(1, len(row.ids)):
            if not row.mask[i]: continue
            own = logits[i - 1, row.ids[i]].item()
            weight = min(2.718281828459045 ** (own - r.logp[begin + i - len(prompt)]), 1.01)
            assert row.logp[i] == pytest.approx(own, abs=1e-4) and row.weight[i] == pytest.approx(weight, abs=1e-3)
            objective += row.adv * weight
    weights = [w for r in plain for w, m in zip(r.weight, r.mask) if m]
    assert max(weights) == pytest.approx(1.01) and min(weights) < 1
    assert any(t.tok(t.tok.decode(r.ids))["input_ids"] != r.ids for r in plain)
    tokens = sum(r.tokens for r in rows)
    assert tokens == sum(s.rollout.tokens * (2 if s.guided else 1) for s in samples if s.group != 2)
    loss, _ = row_loss(t.model, rows, c, t.tok.pad_token_id, tokens) # Before the first update every ratio is 1
    assert loss.item() == pytest.approx(-objective / tokens, abs=1e-4)
    log, kept = policy_gradient(t.model, t.opt, samples, c, t.tok)
    assert log["pg_loss"] == pytest.approx(loss.item(), abs=1e-5) and log["strip_weight"] == pytest.approx(sum(weights) / len(weights)) and sum(kept) == 24

def test_stripped_rows_teach_the_plain_prompt(small, tmp_path):
    "The success of a group was guided; after an update it is likelier without the feedback too, by more than without transfer."
    def gain(mode):
        c = load_config(None, [*small, "algorithm.updates=1", f"algorithm.transfer.mode={mode}"])
        t = Trainer(c, tmp_path / mode)
        samples = collect(t.sampler, t.scenarios[:1], c, 0)
        samples[3].result["acc"] = 1.0
        ids, mask, _ = local.stripped(samples[3].rollout, t.tok, t.sampler.chat)
        def total():
            with torch.no_grad(): return float(forward_logp(t.model, [ids], [mask], t.tok.pad_token_id)[0].sum())
        before = total()
        policy_gradient(t.model, t.opt, samples, c, t.tok)
        return total() - before
    none, strip = gain("none"), gain("strip")
    assert strip > none and strip > 0

def test_a_stripped_rollout_counts_once_in_the_ledger(small, tmp_path, monkeypatch):
    collected = []
    def mixed(*args):
        collected.extend(out := make_mixed(collect(*args)))
        return out
    monkeypatch.setattr(local, "collect", mixed)
    run = train(load_config(None, [*small, "train.steps=1", "algorithm.transfer.mode=strip"]), tmp_path / "r", progress=False).parents[1]
    [row] = read_jsonl(run / "metrics.jsonl")
    assert row["ledger"]["rollouts"] == 8 and row["ledger"]["tokens"] == sum(s.rollout.tokens for s in collected) and 0 < row["strip_weight"] <= 2
    assert row["ledger"]["updates"] == row["groups_kept"] == 1

def test_dropped_groups_are_replaced_up_to_the_limit(small, tmp_path):
    "A policy that solves nothing: all groups are dead, so each step samples as many as it may, and the tasks go on in order."
    c = load_config(None, [*small, "train.steps=2", "algorithm.refill_batches=2", "train.sample_groups=99"])
    run = train(c, tmp_path / "r", progress=False).parents[1]
    metrics, rollouts = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "rollouts.jsonl")
    assert [(m["tasks"], m["groups"], m["groups_kept"], m["ledger"]["rollouts"], m["ledger"]["rollouts_filtered"]) for m in metrics] == [(6, 6, 0, 24, 24), (12, 6, 0, 48, 48)]
    assert read_json(checkpoints(local.open_run(run, c.model_dump(mode="json"), 0))[-1] / "state.json")["tasks"] == 12
    t = Trainer(c, run)
    assert t.tasks == 12
    order = [t.scenarios[i].task.id for i in task_order(len(t.scenarios), 0, 0, 12)]
    for step in (1, 2):
        assert [(r["group"], r["position"]) for r in rollouts if r["step"] == step] == [(g, p) for g in range(6) for p in range(4)]
        assert [r["task_id"] for r in rollouts if r["step"] == step and r["position"] == 0] == order[6 * step - 6:6 * step]
    assert len({r["transcript"] for r in rollouts if r["step"] == 1 and r["position"] == 0}) == 6
    half = [*small, "train.steps=1", "algorithm.refill_batches=2"] # Stopped and resumed, the tasks go on where they were
    train(load_config(None, half), tmp_path / "s", progress=False)
    u = Trainer(load_config(None, half), tmp_path / "s")
    assert u.tasks == 6
    row, samples = u.train_step()
    assert row["tasks"] == 12 and [s.rollout.job.scenario.task.id for s in samples if s.position == 0] == order[6:]
    assert [s.rollout.text for s in samples] == [r["transcript"] for r in rollouts if r["step"] == 2]

@pytest.mark.parametrize("useful, batches, sizes", [((0, 1), 3, [2]), ((1, 3), 3, [2, 1, 1]), ((1, 9), 1, [2, 1, 1]), ((2, 3), 3, [2, 2]), ((2, 4), 3, [2, 2, 1]), ((), 0, [2]), ((), 2, [2, 2, 2])])
def test_as_many_groups_are_added_as_are_missing(small, tmp_path, monkeypatch, useful, batches, sizes):
    t = Trainer(load_config(None, [*small, f"algorithm.refill_batches={batches}"]), tmp_path / "r")
    asked = []
    def by_hand(sampler, scenarios, config, step, batch, first, generate):
        asked.append((len(scenarios), batch, first))
        out = collect(sampler, scenarios, config, step, batch, first)
        for s in out: s.result["acc"] = float(s.group in useful and s.position == 1)
        return out
    monkeypatch.setattr(local, "collect", by_hand)
    samples, tasks, _ = sample_step(t.sampler, t.scenarios, t.config, 0, 7)
    assert asked == [(n, i, sum(sizes[:i])) for i, n in enumerate(sizes)]
    assert tasks == 7 + sum(sizes) and sorted({s.group for s in samples}) == list(range(sum(sizes)))

def test_added_groups_are_guided_in_the_same_share(small, tmp_path):
    t = Trainer(load_config(None, [*small, "train.tasks_per_step=4", "algorithm.refill_batches=2", "algorithm.feedback_guidance.guided_share=0.5"]), tmp_path / "r")
    samples, _, _ = sample_step(t.sampler, t.scenarios, t.config, 0, 0)
    guided = {g: any(s.guided for s in samples if s.group == g) for g in range(12)}
    assert [sum(guided[g] for g in range(b, b + 4)) for b in (0, 4, 8)] == [2, 2, 2]

def test_an_episode_may_be_as_long_as_prompt_and_response(small, tmp_path, world):
    t = Trainer(load_config(None, small), tmp_path / "r")
    assert t.sampler.max_length == 1024 == make_sampler(t.model, t.tok, world, load_config(None, ["limits.max_response_tokens=9999"]), 1.0).max_length
    short = make_sampler(t.model, t.tok, world, load_config(None, ["limits.max_prompt_tokens=200", "limits.max_response_tokens=30"]), 1.0)
    rollouts = short.run([Job(s) for s in t.scenarios[:6]], seed=0)
    assert short.max_length == 230 and max(len(r.ids) for r in rollouts) <= 230

def test_a_policy_of_the_hermes_chat_is_sampled_trained_and_replayed_in_it(small, tmp_path, world):
    chat, scenarios = chat_format("hermes"), world.scenarios("train")[:2]
    tok = train_tokenizer((str(transcribe(best_plan(s), s, chat)[1]) for s in scenarios), 600)
    tok.add_special_tokens(dict(additional_special_tokens=["<|im_start|>", chat.stop]))
    save_policy(tmp_path / "policy", new_policy(tok, layers=1, width=32, max_length=4096), tok)
    c = load_config(None, [*small, f"policy.checkpoint={tmp_path / 'policy'}", "policy.chat=hermes", "limits.max_prompt_tokens=3000", "algorithm.feedback_guidance.max_feedback_tokens=900"])
    t = Trainer(c, tmp_path / "r")
    t.replayer.buffer.add(entry_of(t.scenarios[0]))
    row, samples = t.train_step()
    assert t.sampler.chat.name == t.replayer.chat.name == "hermes" and row["replay_loss"] > 0
    told = next(s for s in samples if s.guided).rollout
    assert told.transcript.prompt.startswith("<|im_start|>system\n") and "<previous_attempts>" in told.transcript.prompt and told.transcript.prompt.count("Attempt 1 (Score: 0.0)") == 1
    [replayed] = t.replayer.rows(rng_for(1, "t"), 1)
    assert replayed.prompt.startswith("<|im_start|>system\n") and replayed.turns[0][0].startswith("<tool_call>") and agent_turns(str(replayed), chat)
    with pytest.raises(ValueError, match=r"no token '<\|im_end\|>', which ends a turn in the hermes chat; set policy.chat"): Trainer(load_config(None, [*small, "policy.chat=hermes"]), tmp_path / "s")

def test_replay_rows_are_plain_fresh_and_sometimes_under_another_name(small, tmp_path):
    c = load_config(None, [*small, "algorithm.transfer.name_dropout=0.5", "algorithm.transfer.guided_rows=0.25"])
    t = Trainer(c, tmp_path / "r")
    s = next(s for s in t.scenarios if s.task.level == 3)
    first = s.company.departments[0]
    t.replayer.buffer.add(entry_of(s, feedback=f"1: Right order: {first.name} {first.phone}: pin."))
    rows = t.replayer.rows(rng_for(0, "t"), 200)
    assert len(rows) == 200 == t.replayer.reexecuted
    guided, other = [("<|feedback|>" in r.prompt) for r in rows], [s.company.name not in str(r) for r in rows]
    assert 25 < sum(guided) < 75 and 70 < sum(other) < 130
    assert len({str(r) for r in rows}) > 190 # Fresh users
    numbers = {d.phone for d in s.company.departments}
    assert all(all(n in str(r) for n in numbers) != o for r, o in zip(rows, other)) # Another name has other numbers
    assert sum(first.phone in r.prompt for r, g, o in zip(rows, guided, other) if g and o) <= 1 < sum(first.phone in r.prompt for r, g, o in zip(rows, guided, other) if g and not o) # In the feedback too
    assert all(r.turns[-1][0].startswith("call ") for r in rows)

def test_department_dropout_leaves_out_what_the_task_does_not_need(small, tmp_path):
    c = load_config(None, [*small, "algorithm.transfer.name_dropout=0.5", "algorithm.transfer.department_dropout=0.5", "algorithm.transfer.guided_rows=0.25"])
    t = Trainer(c, tmp_path / "r")
    s = next(s for s in t.scenarios if s.task.level == 3 and len(s.company.departments) == 5 and "Customer Service" in s.task.ground_truth.path)
    off = [d.name for d in s.company.departments if d.name not in s.task.ground_truth.path]
    t.replayer.buffer.add(entry_of(s, feedback=f"{off[0]} {s.company.department(off[0]).phone} could not help."))
    rows = t.replayer.rows(rng_for(0, "t"), 400)
    assert len(rows) == 400 # Each is served
    def there(r): return sum(r.turns[0][1].count(n) for n in off)
    thin = [r for r in rows if there(r) < 3]
    assert all(s.company.name not in str(r) and "<|feedback|>" not in r.prompt for r in thin) # What feedback speaks of is there
    assert all(r.turns[0][1].count(n) == 1 for r in rows for n in s.task.ground_truth.path)
    plain = [r for r in rows if s.company.name not in str(r) and "<|feedback|>" not in r.prompt]
    assert len(plain) > 100 and 1.2 < sum(map(there, plain)) / len(plain) < 1.8 and {there(r) for r in plain} == {0, 1, 2, 3}

@given(seed=st.integers(0, 2**32), share=st.sampled_from((0.1, 0.5, 1.0)))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_thinned_company_still_serves_the_task(seed, share):
    s = rng_for(seed, "pick").choice(WORLD.scenarios("train"))
    other = rng_for(seed, "other").choice([d.name for d in s.company.departments])
    t = thinned(s, {other}, share, rng_for(seed, "thin"))
    names = [d.name for d in t.company.departments]
    assert {other, "Customer Service", *s.task.ground_truth.path} <= set(names) and 2 <= len(names) <= len(s.company.departments)
    assert [d for d in s.company.departments if d.name in names] == list(t.company.departments) and t.company.path(s.task.request_type) == s.company.path(s.task.request_type)
    assert all(set(r.path) <= set(names) for r in t.company.routing) and (t.task, t.user) == (s.task, s.user)
    if share == 1: assert set(names) == {other, "Customer Service", *s.task.ground_truth.path} or len(names) == 2

def test_a_company_is_thinned_to_two_departments_whatever_else_the_plan_names():
    "A plan that succeeded after calling a department that is not there."
    s = next(s for s in WORLD.scenarios("train") if s.task.ground_truth.path == ("Customer Service",) and len(s.company.departments) < 5)
    there = {d.name for d in s.company.departments}
    absent = next(d.name for t in WORLD.scenarios("train") for d in t.company.departments if d.name not in there)
    for seed in range(20):
        t = thinned(s, {absent}, 1.0, rng_for(seed, "thin"))
        assert len(t.company.departments) == 2 and {d.name for d in t.company.departments} < there | {"Customer Service"}

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

# Stand-ins

LACKING = ["algorithm.transfer.lacking=0.5", "algorithm.transfer.name_dropout=0.5", "algorithm.transfer.department_dropout=0.5", "algorithm.transfer.guided_rows=0.25"]

def test_stand_ins_are_what_the_company_takes_instead_and_nothing_else(small, tmp_path):
    t = Trainer(load_config(None, [*small, *LACKING, "data.folder=data"]), tmp_path / "r")
    t.replayer.fill()
    t.replayer.widen()
    first, found = t.replayer.reexecuted, 0
    told = told_fields(t.replayer.buffer, t.replayer.scenarios)
    for e in t.replayer.buffer:
        s, plan = t.replayer.scenarios[e.task_id], entry_plan(e)
        for d, fields in plan.calls:
            stand_ins = e.payload.get("stand_ins", {}).get(d, [])
            assert set(stand_ins) <= set(s.accepted) - set(fields) # Nothing superfluous
            of_use = set(s.company.department(d).accepted) - set(fields)
            assert of_use & told[s.company.industry, d] <= set(stand_ins) # All that was told elsewhere and is of use here
            found += bool(of_use & set(stand_ins))
        wide = wider(plan, e.payload.get("stand_ins", {}))
        assert set(plan.form) <= set(wide.form) <= set(s.accepted)
        if s.task.ground_truth.ending == "served": # Whoever has everything is served as before, however impatient
            u = for_user(s, random_user(rng_for(0, e.task_id), behavior="difficult"))
            assert play(follow(wide, s.company.name), u).success
    assert found > 100 and first == sum(len(v) for e in t.replayer.buffer for v in e.payload.get("tried", {}).values())
    t.replayer.widen()
    assert t.replayer.reexecuted == first # Nothing is tried twice

def test_rows_with_lacking_users_end_as_is_right_for_them(small, tmp_path):
    t = Trainer(load_config(None, [*small, *LACKING]), tmp_path / "r")
    s = next(s for s in t.scenarios if s.task.level == 2 and s.path[0].alternatives)
    (lacked, other), = s.path[0].alternatives.items()
    e = entry_of(s, feedback="Billing wants: pin.")
    t.replayer.buffer.add(replace(e, payload=e.payload | dict(stand_ins={s.path[0].name: [other]})))
    with patch.object(local, "transcribe", wraps=transcribe) as played: rows = t.replayer.rows(rng_for(0, "t"), 300)
    assert t.replayer.reexecuted == played.call_count > 300 # Every episode is counted, and once
    guided = [r for r in rows if "<|feedback|>" in r.prompt]
    plain = [r for r in rows if "<|feedback|>" not in r.prompt]
    assert len(guided) > 40 and all(r.turns[-1][0].startswith("call ") and f"{other}=" not in r.turns[1][1] for r in guided) # As found
    assert all(f"{other}=" in r.turns[1][1] for r in plain) # The wide plan
    told = [r for r in plain if r.turns[-1][0].startswith("tell ")]
    instead = [r for r in plain if f"{lacked}=none" in r.turns[1][1]]
    assert len(told) > 20 and len(instead) > 5 and not set(map(str, told)) & set(map(str, instead))
    for r in plain:
        none = [x.split("=")[0] for x in r.turns[1][1].split("<|tool|> ")[1].split("<|act|>")[0].split("; ") if x.endswith("=none")]
        assert len(none) <= 1 and (r in told) == (bool(none) and none[0] not in (lacked, other))
        if r not in told: assert "none" not in r.turns[-1][0]

def test_plans_are_as_they_were_without_lacking(small, tmp_path):
    t = Trainer(load_config(None, small), tmp_path / "r")
    for s in t.scenarios[:20]: t.replayer.buffer.add(entry_of(s))
    before = t.replayer.buffer.state_dict()
    t.replayer.widen()
    assert t.replayer.buffer.state_dict() == before and t.replayer.reexecuted == 0

def test_what_was_tried_survives_a_restart(small, tmp_path):
    c = load_config(None, [*small, *LACKING])
    t = Trainer(c, tmp_path / "r")
    for s in t.scenarios: t.replayer.buffer.add(entry_of(s))
    t.train_step()
    t.save()
    again = Trainer(c, tmp_path / "r")
    again.replayer.widen()
    assert again.replayer.reexecuted == 0 and again.replayer.buffer.state_dict() == t.replayer.buffer.state_dict()
    assert any(e.payload.get("stand_ins") for e in again.replayer.buffer)
    assert str(again.replayer.rows(rng_for(3, "t"), 20)) == str(t.replayer.rows(rng_for(3, "t"), 20))

def test_lacking_needs_reexecution(small):
    with pytest.raises(ConfigError, match="only re-executed rows have a fresh user who can lack a field; set transfer.reexecute to true, or lacking to 0"): load_config(None, [*small, "algorithm.transfer.lacking=0.2", "algorithm.transfer.reexecute=false"])

# The same request elsewhere

ELSEWHERE = ["algorithm.transfer.elsewhere=0.25", "algorithm.transfer.name_dropout=0.5", "algorithm.transfer.department_dropout=0.5", "algorithm.transfer.guided_rows=0.25"]

@pytest.fixture
def shipped(small): return [*small, *ELSEWHERE, "data.folder=data"] # Whole industries

def looked(config, out, steps=2 * TRIES):
    "A trainer that knows the right plan of every task, and has looked."
    t = Trainer(load_config(None, config), out)
    t.replayer.fill()
    for _ in range(steps): t.replayer.widen()
    return t

def test_plans_from_elsewhere_are_right_where_they_are(shipped, tmp_path):
    t = looked(shipped, tmp_path / "r")
    r, where = t.replayer, t.replayer.elsewhere.where
    solved = {(s.company.id, s.task.request_type) for s in t.scenarios}
    assert len(r.elsewhere) > 400
    for e in r.elsewhere:
        s, plan = where(e), entry_plan(e)
        assert not s.company.heldout and (s.company.id, s.task.request_type) not in solved
        assert tuple(d for d, _ in plan.calls) == s.task.ground_truth.path
        u = for_user(s, random_user(rng_for(1, e.task_id), behavior="difficult")) # Somebody else
        assert play(follow(plan, s.company.name), u).success
    tries = [len(x) for x in r.elsewhere.tried.values()]
    assert r.reexecuted == sum(tries) and max(tries) <= 2 * TRIES and all(len(set(x)) == len(x) for x in r.elsewhere.tried.values())
    assert {id.split(":")[0] for id in r.elsewhere.tried} <= {s.company.id for s in t.scenarios}
    before = r.reexecuted
    r.widen()
    assert r.reexecuted == before # Nothing is tried twice, and there is an end

def test_rows_from_elsewhere_are_as_many_as_asked_for_and_never_guided(shipped, tmp_path):
    t = looked(shipped, tmp_path / "r", 2)
    for e in list(t.replayer.buffer): t.replayer.buffer.update(replace(e, payload=e.payload | dict(feedback="Billing wants: pin.")))
    before, tried = t.replayer.reexecuted, t.replayer.trials
    with patch.object(local, "transcribe", wraps=transcribe) as played: rows = t.replayer.rows(rng_for(0, "t"), 800)
    assert t.replayer.reexecuted - before == played.call_count == 800 and len(rows) > 750 and t.replayer.trials == tried == before # No row is a trial
    names, found = {s.company.name for s in t.scenarios}, Counter()
    for call in played.call_args_list:
        s, feedback = call.args[1], call.args[3]
        found[":" in s.task.id, s.company.name in names, bool(feedback)] += 1
    assert not found[True, True, True] + found[True, False, True]
    guided, elsewhere = sum(n for k, n in found.items() if k[2]), sum(n for k, n in found.items() if k[0])
    assert guided > 150
    assert abs(elsewhere / (800 - guided) - 0.25) < 0.05 and abs(found[True, True, False] / elsewhere - 0.5) < 0.2 # Half of them with their own name

def test_little_that_was_found_is_not_replayed_often(shipped, tmp_path):
    t = looked(shipped, tmp_path / "r", 1)
    r = t.replayer
    r.elsewhere.entries = dict(list(r.elsewhere.entries.items())[:10])
    got = Counter(":" in r.anywhere(rng_for(0, "t", i), next(iter(r.buffer))).task_id for i in range(2000))
    assert abs(got[True] / 2000 - 10 / (10 + len(r.buffer))) < 0.01
    r.elsewhere.entries = {}
    rng = rng_for(0, "t")
    assert r.anywhere(rng, "e") == "e" and rng.random() == rng_for(0, "t").random() # And nothing is drawn where there is none

def test_nothing_is_tried_elsewhere_before_every_task_was_tried(shipped, tmp_path):
    t = Trainer(load_config(None, [*shipped, "train.tasks_per_step=200", "algorithm.transfer.updates=1", "algorithm.transfer.rows=2"]), tmp_path / "r")
    for s in t.scenarios[:50]: t.replayer.buffer.add(entry_of(s))
    for step, begun in (0, False), (1, False), (2, True): # 500 tasks
        replay_updates(t.model, t.opt, t.replayer, t.tok, step, t.config)
        assert bool(t.replayer.elsewhere.tried) == begun == bool(t.replayer.trials)

def test_a_solved_task_takes_the_place_of_what_was_found(shipped, tmp_path):
    t = Trainer(load_config(None, shipped), tmp_path / "r")
    first, later = t.scenarios[:250], t.scenarios[250:]
    for s in first: t.replayer.buffer.add(entry_of(s))
    t.replayer.widen()
    ids = {f"{s.company.id}:{s.task.request_type}" for s in later} & {e.task_id for e in t.replayer.elsewhere}
    assert len(ids) > 20
    for s in later: t.replayer.buffer.add(entry_of(s))
    t.replayer.widen()
    assert not ids & {e.task_id for e in t.replayer.elsewhere}

def test_a_company_is_asked_its_own_way_first(shipped, tmp_path):
    t = Trainer(load_config(None, shipped), tmp_path / "r")
    r = t.replayer
    r.fill()
    counts, own = plan_counts(r.buffer, r.elsewhere.where), 0
    for (industry, request), routes in counts[0].items():
        for c in (c for c in r.elsewhere.companies.values() if c.industry == industry):
            plans = likely_plans(counts, c, request)
            assert 1 <= len(plans) <= TRIES and len(set(map(str, plans))) == len(plans)
            for d, fields in plans[0].calls:
                assert d in {x.name for x in c.departments}
                if mine := counts[2].get((c.id, d)): own += 1; assert mine[fields] == max(mine.values())
    assert own > 500

def test_what_was_found_elsewhere_survives_a_restart(shipped, tmp_path):
    c = load_config(None, [*shipped, "algorithm.transfer.lacking=0.5"])
    t = Trainer(c, tmp_path / "r")
    for s in t.scenarios[:200]: t.replayer.buffer.add(entry_of(s))
    t.replayer.widen()
    t.train_step()
    t.save()
    again = Trainer(c, tmp_path / "r")
    assert again.replayer.elsewhere.state_dict() == t.replayer.elsewhere.state_dict() and any(e.payload.get("stand_ins") for e in again.replayer.elsewhere)
    assert str(again.replayer.rows(rng_for(3, "t"), 40)) == str(t.replayer.rows(rng_for(3, "t"), 40))
    for x in (t, again): x.replayer.widen()
    assert again.replayer.elsewhere.state_dict() == t.replayer.elsewhere.state_dict()

def test_elsewhere_needs_reexecution(small):
    with pytest.raises(ConfigError, match="plans that were found elsewhere are re-executed; set transfer.reexecute to true, or elsewhere to 0"): load_config(None, [*small, "algorithm.transfer.elsewhere=0.2", "algorithm.transfer.reexecute=false"])

def test_replay_teaches(small, tmp_path):
    t = Trainer(load_config(None, [*small, "algorithm.transfer.updates=5", "algorithm.transfer.rows=8", "algorithm.transfer.warmup_steps=0"]), tmp_path / "r")
    s = t.scenarios[0]
    t.replayer.buffer.add(entry_of(s))
    ids, mask = encode(t.tok, transcribe(best_plan(s), s, t.sampler.chat)[1])
    def loss():
        with torch.no_grad(): return float(nll(t.model, torch.tensor([ids]), torch.tensor([mask])))
    before = loss()
    log = replay_updates(t.model, t.opt, t.replayer, t.tok, 0, t.config)
    assert log["updates"] == 5 and loss() < before - 0.1

def test_replay_fits_the_policy_at_its_temperature(small, tmp_path):
    t = Trainer(load_config(None, [*small, "algorithm.transfer.updates=1", "algorithm.transfer.rows=4", "algorithm.transfer.warmup_steps=0", "algorithm.transfer.temperature=2"]), tmp_path / "r")
    for s in t.scenarios[:4]: t.replayer.buffer.add(entry_of(s))
    rows = [encode(t.tok, x) for x in t.replayer.rows(rng_for(t.config.seed, "replay", 0), 4)]
    ids, mask = pad_rows([i for i, _ in rows], t.tok.pad_token_id), pad_rows([m for _, m in rows], 0)[:, 1:].bool()
    with torch.no_grad(): logp = (t.model(ids).logits[:, :-1].float() / 2).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert replay_updates(t.model, t.opt, t.replayer, t.tok, 0, t.config)["replay_loss"] == pytest.approx(-float(logp[mask].mean()), rel=1e-4)

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

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_and_buffer_survive_a_checkpoint(small, tmp_path, optimizer):
    config = load_config(None, [*small, f"algorithm.transfer.optimizer={optimizer}"])
    t = Trainer(config, tmp_path / "r")
    t.replayer.buffer.add(entry_of(t.scenarios[0]))
    replay_updates(t.model, t.replay_opt, t.replayer, t.tok, 0, config)
    t.step = 1
    t.save()
    u = Trainer(config, tmp_path / "r")
    assert u.step == 1 and u.replayer.buffer.state_dict() == t.replayer.buffer.state_dict()
    a, b = t.replay_opt.state_dict()["state"], u.replay_opt.state_dict()["state"]
    assert len(a) == len(list(t.model.parameters())) and a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    for x in (t, u): replay_updates(x.model, x.replay_opt, x.replayer, x.tok, 1, config)
    assert all(torch.equal(x, y) for x, y in zip(t.model.state_dict().values(), u.model.state_dict().values()))

def test_muon_takes_the_matrices_inside_the_layers_at_its_own_rate(small, tmp_path):
    config = load_config(None, [*small, "algorithm.transfer.optimizer=muon"])
    t = Trainer(config, tmp_path / "r")
    muon, rest = t.replay_opt.parts
    names = {id(p): n for n, p in t.model.named_parameters()}
    inner = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert inner == {n for n in names.values() if n.endswith("_proj.weight")} and len(inner) + sum(len(g["params"]) for g in rest.param_groups) == len(names)
    set_lr(t.replay_opt, 1e-3)
    assert ([g["lr"] for g in muon.param_groups], [g["lr"] for g in rest.param_groups]) == ([pytest.approx(.02)], [1e-3])
    assert t.opt is not t.replay_opt and list(t.optimizers) == ["optimizer", "replay_optimizer"]

def test_the_replay_rate_rises_stays_or_falls():
    def rates(**kw): return [round(replay_lr(TransferConfig(lr=1., warmup_steps=2, **kw), s, 8), 4) for s in (0, 1, 4, 7)]
    assert rates() == [.5, 1., 1., 1.] and rates(schedule="cosine") == [.5, .9619, .5, .0381]

def test_reworded_rows_ask_for_the_same_in_other_words(small, tmp_path):
    def prompts(*more):
        t = Trainer(load_config(None, [*small, "algorithm.transfer.guided_rows=0", "algorithm.transfer.name_dropout=0", *more]), tmp_path / "-".join(["r", *more]))
        s = t.scenarios[0]
        t.replayer.buffer.add(entry_of(s))
        rows = [r for i in range(12) for r in t.replayer.rows(rng_for(i, "t"), 1)]
        assert len(rows) == t.replayer.reexecuted == 12 and all(s.company.name in r.prompt for r in rows)
        return {r.prompt for r in rows}, t.sampler.chat.prompt(s.task.request)
    same, said = prompts("algorithm.transfer.reword=false")
    other, _ = prompts("algorithm.transfer.reword=true")
    assert same == {said} and len(other) > 5

def test_the_evaluation_on_the_way_counts_seen_requests_apart(small, tmp_path):
    t = Trainer(load_config(None, [*small, "train.eval_tasks=20"]), tmp_path / "r")
    row = t.evaluate()
    assert (row["n"], row["n_training_companies"] + row["n_heldout"], row["n_seen"]) == (20, 20, 20) and 0 <= row["acc_seen"] <= 1

def test_small_pieces_hold_every_row_once_and_little_padding():
    rows = [[0] * n for n in (100, 7, 300, 64, 90, 2000, 120, 5)]
    cut = pieces(rows, len, 400)
    assert sorted(len(r) for p in cut for r in p) == sorted(map(len, rows)) and all(len(p) * max(map(len, p)) <= 400 or len(p) == 1 for p in cut)

def test_few_successes_are_not_replayed_more_often_than_asked(small, tmp_path):
    t = TransferConfig(updates=8, rows=32, passes=4)
    assert [replay_count(t, n) for n in (1, 8, 12, 48, 500)] == [1, 1, 2, 6, 8] and replay_count(TransferConfig(updates=8), 1) == 8
    r = Trainer(load_config(None, [*small, "algorithm.transfer.updates=5", "algorithm.transfer.rows=2", "algorithm.transfer.passes=2"]), tmp_path / "r")
    for s in r.scenarios[:3]: r.replayer.buffer.add(entry_of(s))
    assert replay_updates(r.model, r.opt, r.replayer, r.tok, 0, r.config)["updates"] == 3

def test_the_oracle_starts_with_plans_that_all_work(small, tmp_path):
    t = Trainer(load_config(None, [*small, "algorithm.transfer.oracle=true"]), tmp_path / "r")
    assert set(t.replayer.buffer.tasks) == {s.task.id for s in t.scenarios} and len(t.replayer.rows(rng_for(0, "t"), 60)) == 60
    with pytest.raises(ConfigError, match="the right plans are there to be replayed"): load_config(None, [*small, "algorithm.transfer.oracle=true", "algorithm.transfer.mode=none"])
