"""The method without an engine: groups, the mix, the ledger, the objective against slow loops, the replay buffer."""
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fg_dapo.method.groups import Group, Ledger, choose_guided, plan_waves
from fg_dapo.method.objective import BASELINES, dapo_loss, filter_counts, group_advantages, importance_weights, keep_groups, overlong_penalty, replay_loss, token_logp
from fg_dapo.agent.scripted import Plan
from fg_dapo.core import rng_for
from fg_dapo.method.diagnosis import diagnose
from fg_dapo.method.explorer import Known, attempts
from fg_dapo.method.feedback import visible
from fg_dapo.world.generate import random_scenario
from fg_dapo.method.replay import Entry, ReplayBuffer, drop_name, entry_plan, plan_entry

repeatable = settings(deadline=None, derandomize=True, max_examples=100, database=None)

# --- groups ---

sizes = st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))

@repeatable
@given(st.integers(1, 20), st.integers(0, 22), sizes)
def test_waves_deal_out_every_position_once(n, start, sizes):
    waves = plan_waves(n, start, sizes)
    assert [p for w in waves for p in w] == list(range(n)) and all(waves)
    rest = waves[1:] if start else waves
    if start: assert waves[0] == tuple(range(min(start, n)))
    want = [sizes] * len(rest) if isinstance(sizes, int) else [sizes[min(i, len(sizes) - 1)] for i in range(len(rest))]
    assert [len(w) for w in rest[:-1]] == want[:-1] and (not rest or len(rest[-1]) <= want[-1])

@repeatable
@given(st.data(), st.integers(1, 4), st.integers(1, 12), st.integers(0, 4), sizes, st.one_of(st.none(), st.integers(1, 3)))
def test_groups_in_any_order(data, n_groups, n, start, sizes, stop):
    "Several groups in flight at once, finishing in any order: each position once, feedback of earlier waves of the same group only."
    waves = plan_waves(n, start, sizes)
    wave_of = {p: i for i, w in enumerate(waves) for p in w}
    groups = [Group(i, n, guided=data.draw(st.booleans()), waves=waves, stop_after_successes=stop) for i in range(n_groups)]
    flight, handed, truth = [], [[] for _ in groups], {}
    for _ in range(n_groups * n + 1):
        for g in groups:
            new = g.ready()
            handed[g.index] += new
            for p in new:
                cs = g.critiques_for(p)
                failed = [q for q in range(n) if g.guided and wave_of[q] < wave_of[p] and truth[g.index, q][1] and not truth[g.index, q][0]]
                assert [c.attempt - 1 for c in cs] == failed
                assert [c.feedback for c in cs] == [f"group {g.index} position {q}" for q in failed]
                assert [c.score for c in cs] == [q / 100 for q in failed]
                if wave_of[p] == 0 or not g.guided: assert cs == ()
            flight += [(g, p) for p in new]
        if not flight: break
        g, p = flight.pop(data.draw(st.integers(0, len(flight) - 1)))
        acc, speaks = data.draw(st.booleans()), data.draw(st.booleans())
        truth[g.index, p] = acc, speaks
        g.record(p, p / 100, float(acc), f"group {g.index} position {p}" if speaks else None)
    for g in groups:
        assert g.done and g.ready() == [] and sorted(g.outcomes) == sorted(handed[g.index]) == list(range(len(g.outcomes)))
        if stop is None: assert len(g.outcomes) == n
        elif len(g.outcomes) < n: assert g.successes >= stop and len(g.outcomes) in {sum(map(len, waves[:i])) for i in range(1, len(waves))}

def test_a_group_stops_between_waves_and_not_before():
    g = Group(0, 8, stop_after_successes=2)
    for p in g.ready(): g.record(p, 1., float(p == 0))
    assert not g.done and g.ready() == [2, 3]
    g.record(2, 1., 1.)
    assert not g.done and g.ready() == [] # Enough, but position 3 is in flight
    g.record(3, 0., 0.)
    assert g.done and g.ready() == [] and g.asked == (0, 1, 2, 3)

def test_partial_credit_is_a_failure():
    g = Group(0, 3)
    g.ready()
    g.record(0, .9, 0., "Call Sales."); g.record(1, .9, 1., "a success with a penalty has nothing to say")
    g.ready()
    assert [(c.attempt, c.score) for c in g.critiques_for(2)] == [(1, .9)]

@repeatable
@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 2**32), st.integers(0, 50))
def test_the_mix_is_exact_and_repeatable(n, share, seed, step):
    chosen = choose_guided(n, share, seed, step)
    assert len(chosen) == n and sum(chosen) == round(share * n)
    assert chosen == choose_guided(n, share, seed, step)

def test_the_mix_changes_from_step_to_step_and_is_fair():
    rows = [choose_guided(10, .5, seed=1, step=s) for s in range(400)]
    assert len({tuple(r) for r in rows}) > 100
    assert all(.4 < sum(r[i] for r in rows) / 400 < .6 for i in range(10))

# --- ledger ---

counts = st.fixed_dictionaries(dict(rollouts_cold=st.integers(0, 99), rollouts_guided=st.integers(0, 99), tokens=st.integers(0, 9999), updates=st.integers(0, 9),
                                    reexecuted=st.integers(0, 9), seconds=st.floats(0, 1e6)))

@repeatable
@given(st.lists(counts, max_size=8))
def test_the_ledger_adds_up_and_survives_json(steps):
    ledger = Ledger()
    for c in steps: ledger.add(**c)
    for k in ("rollouts_cold", "rollouts_guided", "tokens", "updates", "reexecuted"): assert getattr(ledger, k) == sum(c[k] for c in steps)
    assert ledger.rollouts == ledger.rollouts_cold + ledger.rollouts_guided
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger
    assert list(ledger.as_dict()) == ["rollouts", "rollouts_cold", "rollouts_guided", "rollouts_filtered", "rollouts_failed", "tokens", "updates", "reexecuted", "trials", "seconds"]

@pytest.mark.parametrize("bad,says", [(dict(rollouts=3), "sum of rollouts_cold"), (dict(token=3), "did you mean 'tokens'"), (dict(tokens=-1), "tokens cannot grow by -1"),
                                      (dict(seconds=float("nan")), "seconds cannot grow by nan"), (dict(rollouts_filtered=9), "9 rollouts filtered or failed out of 4")])
def test_a_bad_count_leaves_the_ledger_as_it_was(bad, says):
    ledger = Ledger().add(rollouts_cold=4)
    with pytest.raises(ValueError, match=says): ledger.add(updates=1, **bad)
    assert ledger == Ledger(rollouts_cold=4)

def test_a_ledger_that_does_not_add_up_is_refused():
    d = Ledger().add(rollouts_cold=4, rollouts_guided=4).as_dict()
    for bad in (d | dict(rollouts=9), d | dict(rollouts_guided=3), {k: v for k, v in d.items() if k != "rollouts"}):
        with pytest.raises(ValueError, match="rollouts in all"): Ledger.from_dict(bad)

# --- objective ---

def slow_stats(xs):
    "Mean and unbiased deviation of a list, as verl's GRPO has them."
    if len(xs) == 1: return 0., 1.
    m = sum(xs) / len(xs)
    return m, (sum((x - m)**2 for x in xs) / (len(xs) - 1))**.5

@st.composite
def rows(draw):
    "Rewards, groups and conditions; few groups with numbers that lie side by side, so that a wrong key merges two of them."
    n, rng = draw(st.integers(1, 24)), random.Random(draw(st.integers(0, 2**32)))
    return [rng.choice([-.5, 0., .2, .3, .7, 1.]) if rng.random() < .7 else -.5 for _ in range(n)], [rng.choice([-5, 0, 1, 1000]) for _ in range(n)], [rng.random() < .5 for _ in range(n)]

def as_tensors(reward, group, guided): return torch.tensor(reward, dtype=torch.float64), torch.tensor(group), torch.tensor(guided)

@repeatable
@given(rows(), st.sampled_from(BASELINES), st.booleans())
def test_advantages_against_a_loop(data, baseline, scale_std):
    reward, group, guided = data
    got = group_advantages(*as_tensors(*data), baseline=baseline, scale_std=scale_std).tolist()
    for i, (r, g, f) in enumerate(zip(*data)):
        mates = [(x, y) for x, h, y in zip(*data) if h == g]
        peers = [x for x, y in mates if baseline != "condition" or y == f]
        cold = [x for x, y in mates if not y]
        m, s = slow_stats(peers)
        if baseline == "cold" and len(cold) > 1:
            m, s = slow_stats(cold)
            if len(set(cold)) == 1: s = 1.
        if len(mates) > 1 and len({x for x, _ in mates}) == 1: m = r # A group that came out alike teaches nothing
        assert abs(got[i] - (r - m) / (s + 1e-6 if scale_std else 1)) < 1e-6

@repeatable
@given(rows())
def test_advantages_do_not_depend_on_the_order_of_rows(data):
    order = list(range(len(data[0])))
    random.Random(0).shuffle(order)
    for b in BASELINES:
        a = group_advantages(*as_tensors(*data), baseline=b)
        assert torch.allclose(a[order], group_advantages(*(x[order] for x in as_tensors(*data)), baseline=b), atol=1e-9)

@repeatable
@given(rows())
def test_advantages_of_a_group_sum_to_zero(data):
    reward, group, guided = as_tensors(*data)
    adv = group_advantages(reward, group)
    for g in group.unique():
        if (group == g).sum() > 1: assert abs(adv[group == g].sum()) < 1e-6

def test_advantages_of_close_rewards_keep_their_precision():
    reward = 1000 + torch.tensor([0., .25, .5, .75]) # E[r^2] - E[r]^2 has no digit left here
    want = group_advantages(reward - 1000, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(group_advantages(reward, torch.zeros(4, dtype=torch.long)), want, atol=1e-4)

@repeatable
@given(rows())
def test_filters_against_a_loop(data):
    metric, group, guided = as_tensors(*data)
    def alive(xs): return len(set(xs)) > 1 or len(xs) == 1
    def cold_alive(g):
        cold = [r for r, h, f in zip(*data) if h == g and not f]
        return len(set(cold)) > 1 if len(cold) > 1 else alive([r for r, h in zip(*data[:2]) if h == g])
    want = {g: alive([r for r, h in zip(*data[:2]) if h == g]) for g in set(data[1])}
    want_cold = {g: cold_alive(g) for g in set(data[1])}
    assert keep_groups(metric, group).tolist() == [want[g] for g in data[1]]
    assert keep_groups(metric, group, guided, on="cold").tolist() == [want_cold[g] for g in data[1]]
    for on, w in dict(group=want, cold=want_cold).items():
        assert filter_counts(metric, group, guided, on) == dict(groups=len(want), groups_kept=sum(w.values()), groups_dead=sum(not x for x in want.values()),
                                                                groups_dead_cold=sum(not x for x in want_cold.values()))

@repeatable
@given(rows())
def test_a_dropped_group_has_no_advantage(data):
    reward, group, guided = as_tensors(*data)
    dropped = ~keep_groups(reward, group)
    assert group_advantages(reward, group)[dropped].abs().max() < 1e-6 if dropped.any() else True

ONE = torch.zeros(8, dtype=torch.long)

@repeatable
@given(st.floats(-10, 10), st.integers(2, 40), st.sampled_from(BASELINES), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.data())
def test_equal_rewards_teach_exactly_nothing(reward, n, baseline, scale_std, dtype, data):
    guided = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    equal, other = torch.full((n,), reward, dtype=dtype), torch.tensor([0., 1.], dtype=dtype)
    rewards, groups = torch.cat([equal, other]), torch.tensor([5] * n + [4] * 2)
    adv = group_advantages(rewards, groups, torch.cat([guided, torch.tensor([False, False])]), baseline, scale_std)
    assert adv[:n].tolist() == [0.] * n and adv[n] < 0 < adv[n + 1]
    assert not keep_groups(rewards, groups)[:n].any()

@pytest.mark.parametrize("sums", [[.1 + .2, .3], [.3 - .1, .2], [.7 + .1, .8, .8], [sum([.1] * 10), 1.]])
def test_rewards_that_differ_by_rounding_are_equal(sums):
    reward, group = torch.tensor(sums, dtype=torch.float64), torch.zeros(len(sums), dtype=torch.long)
    assert group_advantages(reward, group).tolist() == [0.] * len(sums) and not keep_groups(reward, group).any()
    assert group_advantages(reward + torch.arange(len(sums)) * 1e-9, group).abs().max() > 0 # What differs by more is not equal

@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_of_whole_numbers_and_of_done_or_not(baseline):
    guided = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    done = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1])
    want = group_advantages(done.double(), ONE, guided, baseline)
    for kind in (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        got = group_advantages(done.to(kind), ONE, guided, baseline)
        assert got.is_floating_point() and torch.allclose(got.double(), want, atol=1e-5)
    assert torch.allclose(group_advantages(done, ONE + 2**62, guided, baseline).double(), want, atol=1e-5) # Any number may name a group

def test_a_group_of_one_is_verls_and_no_rows_are_no_advantages():
    for b in BASELINES:
        assert group_advantages(torch.tensor([.3]), torch.tensor([9]), torch.tensor([1]), b).tolist() == pytest.approx([.3], abs=1e-5)
        assert group_advantages(torch.tensor([]), torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.bool), b).tolist() == []

@pytest.mark.parametrize("value,says", [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_reward_that_is_no_number_is_named(value, says, baseline):
    reward, group, guided = torch.tensor([0., 1., value, 1.]), torch.tensor([3, 3, 8, 8]), torch.tensor([0, 1, 0, 1])
    for f in (lambda: group_advantages(reward, group, guided, baseline), lambda: keep_groups(reward, group), lambda: filter_counts(reward, group)):
        with pytest.raises(ValueError, match=rf"row 2 \(group 8\) is {says}"): f()

def test_no_advantage_explodes_where_cold_rows_agree():
    for cold in (0., .1, .3): # 3 * .1 is not .3 in binary: the deviation of equal rows need not come out as 0
        reward = torch.tensor([cold] * 7 + [1.])
        adv = group_advantages(reward, torch.zeros(8, dtype=torch.long), torch.tensor([0] * 7 + [1]), "cold")
        assert adv.abs().max() <= 1.001

def test_masked_tokens_are_never_read():
    logp = torch.tensor([[-1., float("nan")], [-2., float("-inf")]], requires_grad=True)
    old, mask = torch.tensor([[-1., -1.], [-2., float("nan")]]), torch.tensor([[1, 0], [1, 0]])
    for loss in (dapo_loss(logp, old, torch.tensor([1., -1.]), mask)[0], replay_loss(logp, mask, torch.tensor([1., .5]))):
        logp.grad = None
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logp.grad).all() and (logp.grad[:, 1] == 0).all() and (logp.grad[:, 0] != 0).all()

def test_no_tokens_no_loss():
    logp = torch.zeros(2, 3, requires_grad=True)
    loss, stats = dapo_loss(logp, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3))
    loss.backward()
    assert loss == 0 and (logp.grad == 0).all() and stats["clip_frac"] == 0

def test_where_the_gradient_stops():
    "Clipped from above with A > 0, from below and by the dual clip with A < 0; free on the other side."
    def pull(ratio, a):
        logp = torch.tensor([[ratio]]).log().requires_grad_()
        dapo_loss(logp, torch.zeros(1, 1), torch.tensor([a]), torch.ones(1, 1))[0].backward()
        return logp.grad.item()
    assert pull(1.27, 1.) < 0 and pull(1.29, 1.) == 0 and pull(.5, 1.) < 0
    assert pull(.81, -1.) > 0 and pull(.79, -1.) == 0 and pull(9.9, -1.) > 0 and pull(10.1, -1.) == 0

def test_advantages_a_token():
    adv = torch.tensor([[1., -1.], [2., 0.]])
    loss, _ = dapo_loss(torch.zeros(2, 2), torch.zeros(2, 2), adv, torch.ones(2, 2))
    assert loss.item() == pytest.approx(-.5)

def test_a_weight_scales_what_is_left_after_clipping():
    "By hand: ratios 2 (clipped to 1.28) and 1 with A = 1 and weights 1/2 and 2; ratio 20 (dual clip at 10) with A = -1 and weight 1/4."
    logp = torch.tensor([[2., 1.], [20., 7.]]).log().requires_grad_()
    weight, mask = torch.tensor([[.5, 2.], [.25, float("nan")]], requires_grad=True), torch.tensor([[1, 1], [1, 0]])
    adv = torch.tensor([1., -1.])
    loss, stats = dapo_loss(logp, torch.zeros(2, 2), adv, mask, weight=weight)
    assert loss.item() == pytest.approx((-1.28 * .5 - 1 * 2 + 10 * .25) / 3)
    assert stats == dapo_loss(logp, torch.zeros(2, 2), adv, mask)[1] # What is logged is not weighted
    loss.backward()
    assert logp.grad.tolist() == [[0., pytest.approx(-2 / 3)], [0., 0.]] and weight.grad is None
    by_row = dapo_loss(logp, torch.zeros(2, 2), adv, mask, weight=torch.tensor([.5, .25]))[0]
    assert by_row.item() == pytest.approx((-1.28 * .5 - 1 * .5 + 10 * .25) / 3)

def test_importance_weights_are_cut_and_carry_no_gradient():
    old, sampled = torch.tensor([[-1., -30., 0., -2.]], requires_grad=True), torch.tensor([[-2., -1., -50., -2.]])
    w = importance_weights(old, sampled, cap=2.)
    assert w[0].tolist() == pytest.approx([2., 2.061153622e-09, 2., 1.]) and not w.requires_grad
    assert importance_weights(old, sampled, cap=1e9)[0, 2].item() == pytest.approx(485165195.4, rel=1e-5)

def test_shapes_that_do_not_fit_are_refused():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"adv has shape \(3,\), logp has \(2, 3\)"): dapo_loss(z, z, torch.ones(3), z)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\)"): dapo_loss(z, z, torch.ones(2), z[:, :2])
    with pytest.raises(ValueError, match=r"mask has shape \(3, 2\)"): replay_loss(z, z.T)
    with pytest.raises(ValueError, match=r"logp has shape \(3,\)"): replay_loss(z[0], z[0])
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), logp has \(2, 3\)"): dapo_loss(z, z, torch.ones(2), z, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"sampled_logp has shape \(2, 2\)"): importance_weights(z, z[:, :2])
    with pytest.raises(ValueError, match="cap -1 leaves no weight"): importance_weights(z, z, -1)
    with pytest.raises(ValueError, match="clip_c 1"): dapo_loss(z, z, torch.ones(2), z, clip_c=1)
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"): group_advantages(z, z.long())
    with pytest.raises(ValueError, match="needs `guided`"): group_advantages(z[0], z[0].long(), baseline="cold")
    with pytest.raises(ValueError, match="needs `guided`"): keep_groups(z[0], z[0].long(), on="cold")
    with pytest.raises(ValueError, match="temperature 0"): token_logp(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="a buffer of 11 tokens does not fit into 10"): overlong_penalty(z[0], 10, 11)

def test_overlong_answers_are_punished_in_full_and_no_more():
    assert overlong_penalty(torch.tensor([0, 6, 8, 10, 99]), 10, 4, factor=.5).tolist() == [0, 0, -.25, -.5, -.5]

def test_half_precision_logits():
    logits = torch.randn(1, 2, 4000, generator=torch.Generator().manual_seed(0))
    half = logits.bfloat16()
    ids = torch.tensor([[1, 2]])
    assert torch.allclose(token_logp(half, ids), token_logp(half.float(), ids))

# --- replay ---

entries = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.integers(1, 4)), max_size=40)

@repeatable
@given(entries, st.integers(1, 5), st.sampled_from(["shortest_per_task", "all"]))
def test_the_buffer_against_a_list(adds, capacity, keep):
    buffer, model = ReplayBuffer(capacity, keep), []
    for task, what, length in adds:
        e = Entry(task, length, dict(what=what))
        if keep == "all": news = not any(m.task_id == task and m.payload == e.payload for m in model)
        else:
            old = next((m for m in model if m.task_id == task), None)
            news = old is None or length < old.length
            if old and news: model.remove(old)
        if news: model = (model + [e])[-capacity:]
        assert buffer.add(e) is news
    assert list(buffer) == model and len(buffer) == len(model) and set(buffer.tasks) == {m.task_id for m in model}
    again = ReplayBuffer(capacity, keep)
    again.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert list(again) == model and again.sample(random.Random(3), 7) == buffer.sample(random.Random(3), 7)

@repeatable
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 99))
def test_draws_are_even(n, k, seed):
    buffer = ReplayBuffer(99)
    for i in range(n): buffer.add(Entry(f"t{i}", 1, {}))
    drawn = [e.task_id for e in buffer.sample(random.Random(seed), k)]
    times = [drawn.count(t) for t in buffer.tasks]
    assert len(drawn) == k and max(times) - min(times) <= 1

def test_a_plan_survives_json():
    plan = Plan(("pin",), (("Sales", ("pin",)), ("Billing", ("pin",))))
    e = plan_entry("t", plan, lacks=("email",))
    assert e.length == 3 and entry_plan(Entry(**json.loads(json.dumps(dict(task_id=e.task_id, length=e.length, payload=e.payload))))) == plan
    assert e.payload["lacks"] == ["email"] and plan_entry("t", Plan(plan.form, plan.calls[::-1]), lacks=("email",)).key != e.key

def test_a_buffer_of_another_kind_is_refused():
    saved = ReplayBuffer(4, "all").state_dict()
    for other in (ReplayBuffer(5, "all"), ReplayBuffer(4)):
        with pytest.raises(ValueError, match="the saved buffer has"): other.load_state_dict(saved)

def test_a_key_is_the_same_in_every_process():
    code = "from fg_dapo.method.replay import Entry; print(Entry('t', 1, dict(form=['pin'], feedback='x')).key)"
    keys = {subprocess.run([sys.executable, "-c", code], env=dict(PYTHONHASHSEED=s), capture_output=True, text=True, check=True).stdout for s in ("1", "2")}
    assert keys == {Entry("t", 1, dict(feedback="x", form=["pin"])).key + "\n"}

names = st.sampled_from(["Harbor Bank", "A&B (Trust)", "O'Neil.", "Société", "Harbor"])

@repeatable
@given(names, st.lists(st.sampled_from(["Harbor Bank", "A&B (Trust)", "O'Neil.", "Société", "Harbor", " and ", "ing", ", ", '{"company_name": "', "\\1"]), max_size=12).map("".join))
def test_a_dropped_name_is_gone_and_nothing_else(name, text):
    out = drop_name(dict(messages=[text]), name, r"Quillet \1 Savings")["messages"][0]
    assert out.replace(r"Quillet \1 Savings", name) == text
    def inner(c): return c.isalnum() or c == "_"
    at, whole = 0, 0
    while (at := text.find(name, at)) >= 0:
        hit = not inner(text[at-1:at]) and not inner(text[at+len(name):at+len(name)+1])
        whole, at = whole + hit, at + (len(name) if hit else 1)
    assert out.count(r"Quillet \1 Savings") == whole

def test_drop_name_is_whole_and_case_sensitive():
    assert drop_name("Harbor Bank, Harbor Banking, harbor bank, Harbor Bank's", "Harbor Bank", "Quillet") == "Quillet, Harbor Banking, harbor bank, Quillet's"
    assert drop_name(("Harbor", [1, None, True]), "Harbor", "Quillet") == ("Quillet", [1, None, True])
    for company, other in (("", "Quillet"), ("Harbor", " ")):
        with pytest.raises(ValueError, match="a name is wanted"): drop_name("x", company, other)

def test_importing_groups_and_replay_needs_no_torch():
    code = "import sys, fg_dapo.method.groups, fg_dapo.method.replay; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

# --- the explorer ---

ANSWER = dict(path=(), phones={}, fields={}, required_fields=(), missing=(), alternatives={})

@repeatable
@given(st.integers(0, 2**32))
def test_the_explorer_learns_what_was_observed_and_nothing_else(seed):
    scenario = random_scenario(rng_for(seed, "task"))
    tries = attempts(scenario, rng_for(seed, "guess"), 12)
    assert [str(p) for p, _ in tries] == [str(p) for p, _ in attempts(scenario, rng_for(seed, "guess"), 12)]
    assert all(not e.success for _, e in tries[:-1]) and (tries[-1][1].success or len(tries) == 12)
    known = Known()
    for (plan, episode), (then, _) in zip(tries, tries[1:]):
        facts = visible(diagnose(episode), "observed")
        assert facts == visible(replace(diagnose(episode), **ANSWER), "observed") # No answer in it
        known.learn(facts)
        assert not set(known.path) & known.out and len(known.path) == len(set(known.path))
        assert set(known.wants) <= {d.name for d in scenario.company.departments}
        assert all(set(w) <= set(scenario.company.department(d).accepted) for d, w in known.wants.items())

def test_eight_attempts_are_enough_for_nearly_every_task_of_random_companies():
    rng = rng_for(3, "tasks")
    tries = [attempts(random_scenario(rng), rng) for _ in range(300)]
    solved = [len(t) for t in tries if t[-1][1].success]
    assert len(solved) > 295 and sum(solved) / len(solved) < 4
