"The control arms and the peers: what they show, what they train on, and that they are the same run otherwise."
import copy, json, math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fg_dapo.agent.chat import chat_format
from fg_dapo.config import ConfigError, check_config, keys, load_arms, load_config, merge, parse_override
from fg_dapo.core import read_json, read_jsonl, rng_for
from fg_dapo.engines import local
from fg_dapo.engines.local import Trainer, collect, conditions, judge, policy_gradient, sample_step, taught_rows, train, training_rows
from fg_dapo.engines.sampler import Rollout
from fg_dapo.method.feedback import ControlFeedback, Critique, Failure, accumulate, feedback_section, rough_tokens
from fg_dapo.method.peers import choose_injected, choose_teachers, gate_rows, js_divergence, shaped_advantages, shaped_loss
from fg_dapo.policy import Transcript, load_policy
from fg_dapo.world.records import load_world

from conftest import ROOT

WORLD = load_world(ROOT / "data")
SCENARIOS = WORLD.scenarios("train")
COMPANY = {s.task.id: s.company.name for s in SCENARIOS}

# Runs without a model

class Played:
    "Stands in for a sampler: what becomes of a rollout goes by task and position, and rollouts finish in a drawn order."
    def __init__(self, outcomes, share): self.chat, self.env_seconds, self.outcomes, self.share, self.jobs = chat_format("compact"), 0.0, outcomes, share, []
    def encode(self, text): return text.split()
    def run(self, jobs, seed, on_done):
        queue, rng = list(jobs), rng_for(self.outcomes, "order", seed)
        while queue:
            job = queue.pop(rng.randrange(len(queue)))
            task, p = job.scenario.task.id, job.tag[1]
            self.jobs.append(job)
            acc = float(rng_for(self.outcomes, task, p).random() < self.share)
            result = dict(acc=acc, score=acc, feedback=None if acc else f"About {task} it says: pin.", failure=None if acc else "missing_auth")
            queue += on_done(Rollout(job, SimpleNamespace(result=result), [1, 2], [0, 1], [0.0, -1.0], Transcript("", ())))

def play(content, outcomes, share, steps=2, seed=0, budget=60, overrides=()):
    "A few steps of sampling; the jobs in the order they were played, and the control."
    c = load_config(None, [f"seed={seed}", f"algorithm.feedback_guidance.content={content}", f"algorithm.feedback_guidance.max_feedback_tokens={budget}", "train.tasks_per_step=5", *overrides])
    sampler = Played(outcomes, share)
    control = None if content == "real" else ControlFeedback(content, seed, budget, lambda text: len(sampler.encode(text)))
    tasks = 0
    with patch.object(local, "result_of", lambda episode, generate, text: episode.result):
        for step in range(steps): _, tasks, _ = sample_step(sampler, SCENARIOS, c, step, tasks, None, control)
    return sampler.jobs, control

def lines(job): return [x.split(": ", 1) for x in job.feedback.split("\n")] if job.feedback else []

def schedule(jobs): return [(j.scenario.task.id, j.tag, [int(n) for n, _ in lines(j)]) for j in jobs]

@given(st.integers(0, 10**6), st.floats(0, .8), st.integers(12, 90), st.sampled_from(["all", "last", "summary"]), st.sampled_from([1.0, .6]), st.none() | st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_controls_change_the_text_and_nothing_else(outcomes, share, budget, mode, guided, stop):
    more = [f"algorithm.feedback_guidance.accumulation_mode={mode}", f"algorithm.feedback_guidance.guided_share={guided}", f"algorithm.feedback_guidance.stop_after_successes={'null' if stop is None else stop}"]
    real, _ = play("real", outcomes, share, budget=budget, overrides=more)
    for content in ("shuffled", "foreign", "empty"):
        jobs, control = play(content, outcomes, share, budget=budget, overrides=more)
        assert schedule(jobs) == schedule(real) # Who is sampled when, who is guided, and under which attempt numbers
        shown, stats = [text for j in jobs for _, text in lines(j)], control.stats()
        assert stats == dict(critiques=len(shown), filler=sum("About" not in t for t in shown))
        assert content != "empty" or stats["filler"] == len(shown)
        assert all(len(j.feedback.split()) <= budget for j in jobs)

INDUSTRY = {s.task.id: s.company.industry for s in SCENARIOS}

@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_foreign_feedback_is_about_another_industry(outcomes, steps):
    jobs, _ = play("foreign", outcomes, .2, steps)
    about = [(j.scenario.company.industry, INDUSTRY[text.split()[1]]) for j in jobs for _, text in lines(j) if "About" in text]
    assert about and all(own != other for own, other in about)

@given(st.integers(0, 10**6), st.floats(0, .8), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_shuffled_feedback_is_never_about_the_same_task_or_company(outcomes, share, steps):
    jobs, _ = play("shuffled", outcomes, share, steps)
    seen = 0
    for j in jobs:
        about = [text.split()[1] for _, text in lines(j) if "About" in text]
        assert j.scenario.task.id not in about and j.scenario.company.name not in {COMPANY[t] for t in about}
        seen += len(about)
    assert seen > 0 or share > .5

def test_the_same_seed_draws_the_same_feedback_and_another_seed_another():
    a, b, c = (play("shuffled", 3, .2, seed=s)[0] for s in (0, 0, 1))
    assert [j.feedback for j in a] == [j.feedback for j in b]
    by = lambda jobs: {(j.scenario.task.id, j.tag[1]): j.feedback for j in jobs}
    same = by(a).keys() & by(c).keys()
    assert any(by(a)[k] != by(c)[k] for k in same if by(a)[k])

def test_siblings_of_a_wave_read_the_same_and_the_first_failures_of_a_run_read_filler():
    jobs, control = play("shuffled", 0, 0.0, steps=1)
    for g in range(5):
        for wave in ((0, 1), (2, 3), (4, 5, 6, 7)): assert len({j.feedback for j in jobs if j.tag[0] == g and j.tag[1] in wave}) == 1
    alone = ControlFeedback("shuffled", 0, 60)
    own = (Critique(1, "Billing wants: pin.", .2), Critique(2, "Sales wants: email.", .3))
    for t, company in ("t1", "A Bank"), ("t2", "A Bank"), ("t1", "B Bank"): alone.note(Failure(t, company, .2, "Never shown: pin."))
    out = alone(own, "t1", "A Bank", 0)
    assert [c.attempt for c in out] == [1, 2] and not any("Never" in c.feedback for c in out) and alone.stats() == dict(critiques=2, filler=2)
    assert control.state_dict()["pool"][0]["feedback"].startswith("About")

def test_the_pool_is_bounded_and_survives_as_json():
    a = ControlFeedback("shuffled", 4, 60, capacity=3)
    for i in range(5): a.note(Failure(f"t{i}", f"Company {i}", .1 * i, f"About {i}: pin."))
    b = ControlFeedback("shuffled", 4, 60, capacity=3)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert [f.task_id for f in b.pool] == ["t2", "t3", "t4"] and b.state_dict() == a.state_dict()
    own = (Critique(1, "Billing wants: pin.", .2),)
    assert a(own, "x", "X", 1, 2) == b(own, "x", "X", 1, 2)
    assert {a(own, "x", "X", k)[0].feedback for k in range(40)} == {f"About {i}: pin." for i in (2, 3, 4)}

TEXTS = st.lists(st.sampled_from(["Billing wants: pin, email.", "Call Sales first.", "You asked for: pin. Fraud handles this. Fraud wants: security_word, zip_code, email."]), min_size=1, max_size=5)

@given(TEXTS, TEXTS, st.integers(20, 120), st.sampled_from(["shuffled", "foreign", "empty"]))
@settings(deadline=None, max_examples=80)
def test_a_control_is_never_over_the_budget(own, others, budget, content):
    real = accumulate([Critique(i + 1, t, .2) for i, t in enumerate(own)], "all", budget)
    control = ControlFeedback(content, 0, budget)
    for i, t in enumerate(others): control.note(Failure(f"o{i}", "Other", .3, t))
    out = control(real, "t", "Own", 0)
    assert [c.attempt for c in out] == [c.attempt for c in real] and all(c.feedback for c in out)
    assert rough_tokens(feedback_section(out)) <= (budget if real else 0)
    if content == "empty": assert rough_tokens(feedback_section(out)) == rough_tokens(feedback_section(real))

def test_empty_feedback_has_the_length_of_the_real_one_for_the_tokenizer_that_ships():
    _, tok = load_policy(ROOT / "data/tiny")
    count = lambda text: len(tok(text, add_special_tokens=False)["input_ids"])
    own = tuple(Critique(i + 1, t, .2) for i, t in enumerate(["Billing did not get every field it wants in make_phone_call. You asked for: pin, email. Billing still wants: account_number.", "Sales handles this."]))
    out = ControlFeedback("empty", 0, 160, count)(own, "t", "Own", 0)
    assert 0 <= count(feedback_section(own)) - count(feedback_section(out)) <= 2 and {c.score for c in out} == {0.0}

# Peers by hand

def test_injection_asks_for_plain_rows_that_almost_all_failed():
    t = torch.tensor
    def chosen(success, guided): return choose_injected(t(success).bool(), torch.zeros(len(success), dtype=torch.long), t(guided).bool()).nonzero().flatten().tolist()
    assert chosen([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]) == [3]
    assert chosen([0, 1, 1, 1, 1], [0, 0, 1, 1, 1]) == []
    assert chosen([1] + [0] * 7 + [1], [0] * 8 + [1]) == [] and chosen([1] + [0] * 8 + [1], [0] * 9 + [1]) == [9] # 1/8 is not below 1/8, 1/9 is
    assert chosen([0, 0], [0, 0]) == [] and chosen([1, 1], [1, 1]) == [] # No success; no plain row

def test_shaped_advantages_by_hand():
    reward, group = torch.tensor([.2, .4, 1., .9, 0., 0., 1.]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    guided, injected = torch.tensor([0, 0, 1, 1, 0, 0, 1]).bool(), torch.tensor([0, 0, 1, 0, 0, 0, 1]).bool()
    adv, keep = shaped_advantages(reward, group, guided, injected) # Group 0: mean .3, deviation .1414; group 1: mean 0, none
    assert adv.tolist() == pytest.approx([-.70710, .70710, 4.94972, 0, 0, 0, 1], abs=1e-3) and keep.all()
    adv, keep = shaped_advantages(reward, group, guided, torch.zeros(7, dtype=torch.bool))
    assert keep.tolist() == [True] * 4 + [False] * 3 and adv[2:].tolist() == [0] * 5

def test_shaped_loss_and_divergence_in_pieces_are_those_of_the_whole():
    logp, mask, adv = torch.tensor([[.1, .4], [.9, .3]]).log(), torch.tensor([[1, 1], [1, 0]]), torch.tensor([1., -2.])
    whole, weight = shaped_loss(logp, adv, mask)
    assert whole.item() == pytest.approx(-(.5 + .8 - 2 * .9) / 3) and weight == pytest.approx((.5 + .8 + .9) / 3)
    parts = [shaped_loss(logp[i:i + 1], adv[i:i + 1], mask[i:i + 1], tokens=3)[0].item() for i in (0, 1)]
    assert sum(parts) == pytest.approx(whole.item())
    p, q = torch.tensor([.5, .3, .2]), torch.tensor([.2, .2, .6])
    m = (p + q) / 2
    by_hand = sum(.5 * a * math.log(a / c) + .5 * b * math.log(b / c) for a, b, c in zip(p.tolist(), q.tolist(), m.tolist()))
    assert js_divergence(p.log()[None] + 7, q.log()[None] - 3).item() == pytest.approx(by_hand, abs=1e-6) # Logits, so a constant does nothing
    assert js_divergence(p.log()[None] * 2, q.log()[None] * 2, temperature=2.).item() == pytest.approx(by_hand, abs=1e-6)

def test_the_gate_is_on_the_mean_over_a_rows_tokens():
    student, teacher = torch.tensor([[-1., -1., -9.], [-1., -1., -1.]]), torch.tensor([[-1.1, -1.5, float("nan")], [-.5, -1.2, -1.1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert gate_rows(student, teacher, mask, .29).tolist() == [True, False] and gate_rows(student, teacher, mask, .31).tolist() == [False, False]

def test_teachers_by_hand():
    success, group, guided = torch.tensor([0, 1, 0, 1, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1, 0, 1]).bool()
    assert choose_teachers(success, group, guided) == [3, -1, -1, -1, -1, -1, -1]

# Peers in the engine

TINY = [f"policy.checkpoint={ROOT / 'data/tiny'}", f"data.folder={ROOT / 'data'}", "train.rollouts=4", "train.tasks_per_step=3", "train.steps=2", "train.checkpoint_every=1", "train.eval_every=0", "train.threads=1",
    "limits.max_new_tokens=96", "algorithm.feedback_guidance.detail=full", "algorithm.transfer.updates=1", "algorithm.transfer.rows=4"]

@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    "Four groups of the policy that ships: plain rows fail, guided rows mostly succeed."
    t = Trainer(load_config(None, TINY), tmp_path_factory.mktemp("arms") / "r")
    samples = collect(t.sampler, t.scenarios[:4], t.config, 0)
    success, _, guided = conditions(samples)
    assert (success & guided).sum() >= 3 and (~success & ~guided).sum() >= 4
    samples[0].result["acc"] = samples[0].result["score"] = 1.0 # One group has a plain success
    return t, samples

def with_mode(mode, *more): return load_config(None, [*TINY, "algorithm.lr=0.1", f"algorithm.transfer.mode={mode}", *more]) # For plain gradient descent

def probabilities(model, ids, mask):
    "Of each token the policy wrote, and the whole distributions."
    with torch.no_grad(): p = model(torch.tensor([ids])).logits[0].softmax(-1)
    at = [i for i in range(1, len(ids)) if mask[i]]
    return [p[i - 1, ids[i]].item() for i in at], p[[i - 1 for i in at]]

def test_the_shaped_objective_by_hand(rollouts):
    t, samples = rollouts
    c = with_mode("shaped", "algorithm.updates=1")
    rows = training_rows(samples, c, t.model, t.tok)
    kept = judge(samples, c)[1].tolist()
    success, group, guided = (x.tolist() for x in conditions(samples))
    dead = {g for g in group if not any(s and not r for s, g2, r in zip(success, group, guided) if g2 == g)}
    rescued = {g: next(i for i in range(len(samples)) if group[i] == g and success[i] and guided[i]) for g in dead if any(s and r for s, g2, r in zip(success, group, guided) if g2 == g)}
    assert 0 not in dead and len(rescued) >= 2
    injected = [r for r in rows if r.injected]
    assert {r.group for r in injected} == set(rescued) and len(injected) == len(rescued) and all(r.adv == pytest.approx(1, abs=1e-5) for r in injected)
    assert len(rows) - len(injected) == sum(k and not r for k, r in zip(kept, guided)) # No guided row as sampled
    objective = sum(r.adv * r.tokens for r in rows if not r.injected) # The ratio is 1
    for r in injected:
        s = samples[rescued[r.group]].rollout
        prompt = t.sampler.encode(t.sampler.chat.prompt(s.job.scenario.task.request))
        assert r.ids == prompt + s.ids[s.mask.index(1):]
        objective += r.adv * sum(p / (p + .1) for p in probabilities(t.model, r.ids, r.mask)[0])
    model = copy.deepcopy(t.model)
    log, trained = policy_gradient(model, torch.optim.SGD(model.parameters()), samples, c, t.tok)
    assert log["pg_loss"] == pytest.approx(-objective / sum(r.tokens for r in rows), abs=1e-5) and log["injected_rows"] == len(injected) and trained == kept
    before, after = (sum(map(math.log, probabilities(m, injected[0].ids, injected[0].mask)[0])) for m in (t.model, model))
    assert after > before and 0 < log["shaped_weight"] < 1

def test_the_distillation_loss_and_its_gate_by_hand(rollouts):
    t, samples = rollouts
    c = with_mode("gated", "algorithm.updates=1", "algorithm.pg_weight=0", "algorithm.transfer.gate=0.8")
    taught, asked = taught_rows(samples, c, t.model, t.tok)
    gaps, total, tokens = [], 0.0, 0
    for s, i in zip(samples, choose_teachers(*conditions(samples))):
        if i < 0: continue
        r, prompt = s.rollout, t.sampler.encode(samples[i].rollout.transcript.prompt)
        begin = r.mask.index(1)
        (own, p), (theirs, q) = probabilities(t.model, r.ids, r.mask), probabilities(t.model, prompt + r.ids[begin:], [0] * len(prompt) + r.mask[begin:])
        gaps.append(sum(math.log(a / b) for a, b in zip(own, theirs)) / len(own))
        if gaps[-1] <= .8: continue
        m, tokens = (p + q) / 2, tokens + len(own)
        total += float(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
    assert asked == len(gaps) and 0 < len(taught) == sum(g > .8 for g in gaps) < asked
    model = copy.deepcopy(t.model)
    log, _ = policy_gradient(model, torch.optim.SGD(model.parameters()), samples, c, t.tok)
    assert log["distill_loss"] == pytest.approx(total / tokens, abs=1e-5) and log["gate_share"] == pytest.approx(len(taught) / asked) and log["distilled_rows"] == len(taught)
    assert log["pg_loss"] is None and log["updates"] == 1
    again = local.taught_loss(t.model, taught, t.tok.pad_token_id, tokens).item()
    ids = [(r.ids, r.mask, r.teacher_ids, r.teacher_mask) for r in taught]
    now = sum(float(js_divergence(probabilities(model, i, m)[1].log(), probabilities(t.model, j, n)[1].log()).sum()) for i, m, j, n in ids) / tokens
    assert now < again == pytest.approx(total / tokens, abs=1e-5) # The student has moved towards what the teacher was

@pytest.mark.parametrize("mode, baseline, filter_on", [("none", "group", "group"), ("strip", "cold", "group"), *((m, b, f) for m in ("shaped", "gated") for b in ("group", "condition", "cold") for f in ("group", "cold"))])
def test_the_update_does_not_depend_on_how_it_is_cut(rollouts, monkeypatch, mode, baseline, filter_on):
    t, samples = rollouts
    c = with_mode(mode, "algorithm.updates=2", f"algorithm.baseline={baseline}", f"algorithm.filter_on={filter_on}")
    def updated():
        model = copy.deepcopy(t.model)
        log, kept = policy_gradient(model, torch.optim.SGD(model.parameters()), samples, c, t.tok)
        return log, kept, torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    log, kept, whole = updated()
    cut = local.pieces
    monkeypatch.setattr(local, "pieces", lambda rows, length, tokens=1: cut(rows, length, tokens))
    log2, kept2, parts = updated()
    assert kept == kept2 and any(kept) and log["updates"] in (1, 2) and (whole - start).norm() > 1e-4
    assert (whole - parts).norm() < 1e-3 * (whole - start).norm()
    numbers = [k for k, v in log.items() if isinstance(v, float)]
    assert {k: log2[k] for k in numbers} == pytest.approx({k: log[k] for k in numbers}, abs=1e-4) and all(math.isfinite(log[k]) for k in numbers)
    assert (mode == "shaped") == ("injected_rows" in log) and (mode == "gated") == ("gate_share" in log)

# Whole runs

def lasting(folder):
    "Everything of a run but time, memory, and what the loop around `train_step` adds."
    rows = [{k: v for k, v in r.items() if k not in ("seconds", "peak_rss_mb", "ledger", "alarms")} | dict(ledger={k: v for k, v in r["ledger"].items() if k != "seconds"}) for r in read_jsonl(folder.parents[1] / "metrics.jsonl")]
    state = read_json(folder / "state.json")
    state["ledger"].pop("seconds")
    return rows, state, (folder / "model.safetensors").read_bytes(), (folder.parents[1] / "rollouts.jsonl").read_bytes()

@pytest.mark.parametrize("arm", ["content=shuffled", "content=empty", "mode=shaped", "mode=gated"])
def test_a_resumed_run_and_a_second_run_are_the_same_run(tmp_path, arm):
    key = "algorithm.feedback_guidance." if arm.startswith("content") else "algorithm.transfer."
    overrides = [*TINY, key + arm]
    straight = train(load_config(None, overrides), tmp_path / "a", progress=False)
    t = Trainer(load_config(None, overrides), tmp_path / "b")
    row, samples = t.train_step()
    local.append_jsonl(t.run / "metrics.jsonl", row)
    for s in samples:
        if s.group < t.config.train.sample_groups: local.append_jsonl(t.run / "rollouts.jsonl", local.rollout_row(s, step=t.step))
    t.save()
    resumed = train(load_config(None, overrides), tmp_path / "b", progress=False)
    a, b = lasting(straight), lasting(resumed)
    assert a == b
    rows, state = a[:2]
    if arm.startswith("content"):
        assert all(r["control"]["critiques"] > 0 for r in rows) and len(state["control"]["pool"]) == (sum(sum(r["failures"].values()) for r in rows) if "shuffled" in arm else 0)
        assert rows[-1]["ledger"]["rollouts_guided"] > 0
    if arm == "mode=shaped": assert sum(r["injected_rows"] for r in rows) > 0 and all(0 < r["shaped_weight"] < 1 for r in rows if r["injected_rows"])
    if arm == "mode=gated": assert sum(r["distilled_rows"] for r in rows) > 0 and all(0 < r["distill_loss"] < math.log(2) for r in rows if r["distilled_rows"])
    assert ("control" in state) == arm.startswith("content")

def test_a_group_that_stops_early_saves_its_rollouts(small, tmp_path, monkeypatch):
    "Of two groups one succeeds at once and one never: 2 + 8 rollouts in place of 16."
    c = load_config(None, [*small, "train.rollouts=8", "algorithm.feedback_guidance.stop_after_successes=2"])
    t = Trainer(c, tmp_path / "r")
    easy, judged, played = t.scenarios[local.task_order(len(t.scenarios), 0, 0, 2)[0]].task.id, local.result_of, []
    def by_hand(episode, *args):
        out = judged(episode, *args)
        played.append(episode.scenario.task.id)
        return out | dict(acc=1.0, score=1.0, feedback=None, failure=None) if episode.scenario.task.id == easy else out
    monkeypatch.setattr(local, "result_of", by_hand)
    row, samples = t.train_step()
    assert len(played) == len(samples) == 10 and played.count(easy) == 2
    assert [(s.group, s.position) for s in samples] == [(0, 0), (0, 1)] + [(1, p) for p in range(8)]
    assert row["ledger"]["rollouts"] == 10 and row["ledger"]["rollouts_cold"] == 4 and row["ledger"]["tokens"] == sum(s.rollout.tokens for s in samples)
    assert row["acc_by_position"] == [.5, .5] + [0.0] * 6

# Configurations

ARMS = ROOT / "experiments/configs/arms.yaml"

def test_the_arms_differ_in_what_they_are_about():
    arms = load_arms(ARMS)
    def kind(c): return c.algorithm.feedback_guidance.enable, c.algorithm.feedback_guidance.content, c.algorithm.transfer.mode
    assert {k: kind(c) for k, c in arms.items()} == dict(dapo=(False, "real", "none"), dapo_replay=(False, "real", "replay"), fg_plan=(True, "real", "none"), fg_replay=(True, "real", "replay"), fg_full=(True, "real", "replay"),
        fg_shuffled=(True, "shuffled", "replay"), fg_foreign=(True, "foreign", "replay"), fg_empty=(True, "empty", "replay"), golf=(True, "real", "shaped"), sdpo_gated=(True, "real", "gated"), oracle=(False, "real", "replay"))
    def value(c, key):
        for part in key.split("."): c = getattr(c, part)
        return c
    def differ(*names): return {k for k in keys() if k != "arm" and len({str(value(arms[a], k)) for a in names}) > 1}
    fb = "algorithm.feedback_guidance."
    groups = {fb + "start_rollout", fb + "wave_sizes", fb + "stop_after_successes", "train.tasks_per_step"}
    assert differ("dapo_replay", "fg_replay") == {fb + "enable"} and differ("fg_replay", "fg_shuffled", "fg_foreign", "fg_empty") == {fb + "content"} # The control and the controls
    assert differ("fg_full", "fg_plan", "golf", "sdpo_gated") == {"algorithm.transfer.mode"} and differ("fg_replay", "fg_full") == groups
    assert differ("dapo", "fg_plan") - groups == {fb + "enable"} and arms["dapo"].algorithm.feedback_guidance.stop_after_successes is None
    assert differ("oracle", "dapo_replay") == {"algorithm.transfer.oracle", "algorithm.pg_weight", fb + "stop_after_successes", "train.tasks_per_step", "train.rollouts"}

@pytest.mark.parametrize("override, says", [("algorithm.feedback_guidance.content=shuffled", "algorithm.feedback_guidance.content: the verl engine shows real feedback only, not 'shuffled'; set it to real, or use engine: local"),
    ("algorithm.feedback_guidance.content=empty", "not 'empty'"), ("algorithm.transfer.mode=shaped", "algorithm.transfer.mode: the verl engine has none, replay and strip, not 'shaped'; use one of them, or engine: local"), ("algorithm.transfer.mode=gated", "not 'gated'")])
def test_the_verl_engine_refuses_what_only_the_local_one_has(override, says):
    assert load_config(None, [override]).engine == "local"
    with pytest.raises(ConfigError) as e: check_config(merge(dict(engine="verl"), parse_override(override)))
    assert len(e.value.errors) == 1 and says in e.value.errors[0]

def test_settings_that_leave_nothing_to_train_or_no_mean_are_refused():
    for mode in ("strip", "shaped"):
        with pytest.raises(ConfigError, match=f"'{mode}' is a part of the policy gradient"): load_config(None, ["algorithm.pg_weight=0", f"algorithm.transfer.mode={mode}"])
    assert load_config(None, ["algorithm.pg_weight=0", "algorithm.transfer.mode=gated"]).algorithm.pg_weight == 0
    with pytest.raises(ConfigError, match="one row has none"): load_config(None, ["algorithm.feedback_guidance.start_rollout=1", "algorithm.transfer.mode=shaped"])
