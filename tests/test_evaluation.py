"""Metrics against hand-computed numbers, failure tables, figures and reports. All run folders here are synthetic."""
import itertools, json, math, re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from markdown_it import MarkdownIt
from scipy import stats

from fg_dapo.core import append_jsonl, read_json, write_json
from fg_dapo.evaluation import plots
from fg_dapo.evaluation.failures import failure_counts, failure_table, failures_by_level, feedback_effect
from fg_dapo.evaluation.metrics import (arm_iqm, behavioral, censored_ratio, compute_all_metrics, eval_stream, first_reach, holm, iqm, mean_interval, median_reach, pass_at_k, pass_hat_k,
    pass_table, seed_interval, sign_flip, stratified_bootstrap, success_rate, verdict)
from fg_dapo.agent.bounds import floor_and_ceiling
from fg_dapo.world.generate import generate_world
from fg_dapo.world.records import save_world
from fg_dapo.evaluation.report import bounds_of_runs, build_report, example_group, final_rates, frame, load_runs, md_block, md_line, users_table, code, to_markdown, write_report
from fg_dapo.evaluation.synthetic import synthetic_run

quick = settings(deadline=None, max_examples=60)

# --- rates

@quick
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_formula(cn):
    c, n = cn
    z, p = stats.norm.ppf(0.975), c / n
    mid, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    r = success_rate(c, n)
    assert r["low"] == pytest.approx(max(0, mid - half), abs=1e-9) and r["high"] == pytest.approx(min(1, mid + half), abs=1e-9)
    assert r["rate"] == p and -1e-12 <= r["low"] <= p <= r["high"] + 1e-12

def test_wilson_hand_numbers():
    r = success_rate(0, 10)
    assert r["low"] == 0 and r["high"] == pytest.approx(0.277533, abs=1e-6)
    assert success_rate(0, 0) == dict(successes=0, n=0, rate=None, low=None, high=None)
    with pytest.raises(ValueError, match="-1 successes of 3"): success_rate(-1, 3)

def test_seed_interval_says_what_it_is():
    assert seed_interval([None, float("nan")])["how"] == "none"
    assert seed_interval([0.5], [None])["how"] == "none"
    one = seed_interval([0.3, None], [20, 20])
    assert (one["how"], one["seeds"]) == ("wilson", 1) and one["low"] == pytest.approx(success_rate(6, 20)["low"])
    assert seed_interval([0.2, 0.6])["how"] == "range"
    x = [0.1, 0.25, 0.3]
    low, high = stats.t.interval(0.95, 2, np.mean(x), stats.sem(x))
    three = seed_interval(x)
    assert three["how"] == "t" and three["low"] == pytest.approx(max(0, low)) and three["high"] == pytest.approx(high)

# --- pass@k

@quick
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_estimators_are_the_average_over_all_subsets(nck):
    n, c, k = nck
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    assert pass_hat_k(n, c, k) == pytest.approx(np.mean([all(s) for s in subsets]))

def test_pass_table():
    t = pass_table([(8, 8), (4, 0), (2, 1)], ks=(1, 4, 8, 16))
    assert [r["tasks"] for r in t] == [3, 2, 1, 0]
    assert [r["pass_at_k"] for r in t] == pytest.approx([0.5, 0.5, 1.0, None])
    assert t[3]["pass_hat_k"] is None
    with pytest.raises(ValueError, match="k=0"): pass_at_k(4, 2, 0)

# --- aggregates

@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_iqm_is_the_trimmed_mean(xs):
    k = int(0.25 * len(xs)) # rliable: whole scores are cut from both ends
    assert iqm(xs) == pytest.approx(np.mean(sorted(xs)[k:len(xs) - k])) == pytest.approx(stats.trim_mean(xs, 0.25))

def test_stratified_bootstrap_resamples_within_tasks():
    same = stratified_bootstrap([[0.1, 0.9]] * 3, stat=np.mean, reps=50) # Within a task nothing varies, so nothing may vary
    assert same["low"] == same["high"] == pytest.approx(0.5)
    x = np.random.default_rng(0).random((10, 1))
    ours = stratified_bootstrap(x, stat=np.mean, reps=4000)
    theirs = stats.bootstrap((x[:, 0],), np.mean, method="percentile", n_resamples=4000, random_state=0).confidence_interval
    assert ours["low"] == pytest.approx(theirs.low, abs=0.02) and ours["high"] == pytest.approx(theirs.high, abs=0.02)
    assert stratified_bootstrap([[0.2, 0.4]])["low"] is None
    with pytest.raises(ValueError, match="runs x tasks"): stratified_bootstrap([0.1, 0.2])

# --- reaching a threshold

def test_first_reach():
    assert first_reach([0, 10, 20], [0.1, 0.7, 0.2], 0.7) == (10, False) # At the threshold counts, and falling back does not undo it
    assert first_reach([0, 10, 20], [0.1, None, 0.2], 0.7) == (20, True)
    assert first_reach([], [], 0.7) == (None, True)
    assert median_reach([(10, False), (30, False), (20, True)]) == (30, False)
    assert median_reach([(10, False), (20, True)]) == (20, True)
    assert median_reach([]) == (None, True)

def test_censored_ratio():
    free = censored_ratio([(800, False), (400, False), (200, False)], [(100, False), (100, False), (100, False)])
    assert free["ratio"] == pytest.approx(4) and free["bound"] is None and free["low"] >= 2 - 1e-9 and free["high"] <= 8 + 1e-9
    logs = np.log([8, 4, 2])
    ci = stats.bootstrap((logs,), np.mean, method="percentile", n_resamples=5000, random_state=0).confidence_interval
    assert np.log([free["low"], free["high"]]) == pytest.approx([ci.low, ci.high], abs=0.1)
    lower = censored_ratio([(800, True), (400, False)], [(100, False), (100, False)])
    assert lower["bound"] == "at least" and lower["high"] is None and lower["low"] is not None
    upper = censored_ratio([(800, False), (400, False)], [(100, True), (100, False)])
    assert upper["bound"] == "at most" and upper["low"] is None and upper["high"] is not None
    for a, b in (([(8, True), (8, False)], [(8, False), (8, True)]), ([(8, False)], [(0, False)]), ([(None, True)], [(8, False)]), ([], [])):
        assert censored_ratio(a, b)["ratio"] is None and censored_ratio(a, b)["bound"] == "undetermined"
    one = censored_ratio([(8, False)], [(4, False)])
    assert one["ratio"] == pytest.approx(2) and one["low"] is None and one["pairs"] == 1

# --- Holm

@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(ps):
    got = holm({str(i): p for i, p in enumerate(ps)})
    for i in range(len(ps)):
        sets = [s for k in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), k) if i in s]
        assert got[str(i)] == pytest.approx(max(min(1, len(s) * min(ps[j] for j in s)) for s in sets))

def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match="1.2 of 'mix'"): holm(dict(mix=1.2))

def test_verdict_needs_seeds_and_the_whole_interval():
    assert verdict(2, 3, 2.5, 5) == "met" and verdict(2, 3, 1.9, 5) == "not met" and verdict(2, 3, 2.5, 4) == "not measured"
    assert verdict(2, 1.5, None, 5, "at most") == "not met" and verdict(2, 3, None, 5, "at most") == "not measured"
    assert verdict(2, None, None, 9) == "not measured" and verdict(2, 1.5, 1.2, 5, "at least") == "not measured"

# --- all metrics

def ev(step, acc, **kw): return dict(step=step, tasks=step * 8, rollouts=step * 64, split="val", mode="cold", temperature=1.0, n=50, acc=acc) | kw

def test_compute_all_metrics():
    evals = [ev(0, 0.1), ev(10, 0.72), ev(5, 0.4), ev(10, 0.99, temperature=0.0), ev(10, 0.99, split="test"), ev(10, 0.9, mode="feedback", acc_first=0.7)]
    rows = [dict(mode="cold", acc=1, tool_calls=6, best_tool_calls=3, partial_scores=dict(collected_all=1, order_ok=1)),
            dict(mode="cold", acc=0, tool_calls=3, best_tool_calls=3, partial_scores=dict(collected_all=0, order_ok=1)),
            dict(mode="feedback", attempt=0, acc=1, tool_calls=3, best_tool_calls=3, partial_scores=dict(collected_all=0))]
    m = compute_all_metrics(dict(evals=evals, rollouts=rows))
    assert set(m) == {"sample_efficiency", "learning_quality", "behavioral"}
    assert m["sample_efficiency"] == {"tasks_to_70": dict(tasks=80, censored=False), "tasks_to_90": dict(tasks=80, censored=True), "success@N": {"0": 0.1, "40": 0.4, "80": 0.72}}
    assert m["learning_quality"] == dict(base_policy_success=0.72, with_feedback_success=0.9, improvement_from_feedback=pytest.approx(0.2))
    assert m["behavioral"] == dict(info_gathering_completeness=0.5, call_order_correctness=1.0, tool_call_efficiency=0.5, episodes=2)
    for result in (m, compute_all_metrics({}), compute_all_metrics(dict(evals=[ev(0, None)]))): json.dumps(result, allow_nan=False)
    assert [r["acc"] for r in eval_stream(evals, temperature=0.0)] == [0.99]
    assert behavioral([])["episodes"] == 0
    assert behavioral([dict(acc=0), dict(acc=1, guided=True), dict(acc=1, attempt=1)])["episodes"] == 1 # Guided and second attempts say nothing about the policy alone

# --- failures

def roll(failure, **kw): return dict(arm="a", seed=0, mode="cold", task_id="t", acc=int(failure is None), failure=failure, level=1) | kw

def test_failure_table_counts():
    rows = pd.DataFrame([roll("x")] * 3 + [roll("y")] + [roll(None)] * 6 + [roll("y", arm="b"), roll(None, arm="c")])
    t = failure_table(rows)
    assert t[["arm", "kind", "n", "failures", "episodes"]].values.tolist() == [["a", "x", 3, 4, 10], ["a", "y", 1, 4, 10], ["b", "y", 1, 1, 1]]
    assert t["share_of_failures"].tolist() == [0.75, 0.25, 1.0] and t["share_of_episodes"].tolist() == [0.3, 0.1, 1.0]
    assert failure_table(pd.DataFrame([roll(None)])).empty
    assert failure_table(pd.DataFrame([roll(None, acc=0)]))["kind"].tolist() == ["unknown"]
    assert failures_by_level(pd.concat([rows, pd.DataFrame([roll("x", level=4)])])).set_index(["arm", "kind"]).loc[("a", "x"), 4] == 1.0

def test_failure_counts_use_all_episodes():
    t = failure_counts(pd.DataFrame([dict(arm="a", mode="cold", n=20, k=2, acc=0.9, failures=dict(x=2))]))
    assert t[["n", "episodes"]].values.tolist() == [[2, 20]]

@pytest.mark.parametrize("n,k,failures,acc,want", [
    (16, 4, dict(x=16), 0.0, {"x": 1.0}), # 16 failed of 16 is all of them, however many samples a task has
    (16, 1, dict(x=4, y=4), 0.5, {"x": 0.25, "y": 0.25}),
    (8, 8, dict(x=1), 0.5, {"x": 0.125, "unknown": 0.375}), # Three failed without a kind
    (4, 2, {}, 1.0, {}), (4, 2, {}, None, {}), (4, None, dict(x=1), None, {"x": 0.25})])
def test_shares_of_failures_are_of_episodes(n, k, failures, acc, want):
    t = failure_counts(pd.DataFrame([dict(arm="a", mode="cold", n=n, k=k, acc=acc, failures=failures)]))
    assert dict(zip(t["kind"], t["share_of_episodes"])) == want

@pytest.mark.parametrize("row,says", [(dict(n=3, failures=dict(x=4)), "4 failed episodes of n = 3"), (dict(n=float("nan"), failures=dict(x=4)), "n is nan"),
    (dict(n=2.5, failures={}), "n is 2.5"), (dict(n=9, failures=dict(x=-1)), "'x': -1"), (dict(n=9, failures=dict(x=.5)), "'x': 0.5"), (dict(n=-1, failures={}), "n is -1")])
def test_counts_of_failures_that_cannot_be_are_refused(row, says):
    with pytest.raises(ValueError, match=re.escape(says)): failure_counts(pd.DataFrame([dict(arm="a", mode="cold", **row)]))

@quick
@given(st.lists(st.sampled_from([None, "x", "y"]), min_size=1, max_size=40), st.integers(1, 8))
def test_counts_and_rows_of_failures_make_one_table(outcomes, k):
    rows = pd.DataFrame([dict(arm="a", mode="cold", acc=int(f is None), failure=f) for f in outcomes])
    counts = {f: outcomes.count(f) for f in ("x", "y") if f in outcomes}
    row = dict(arm="a", mode="cold", n=len(outcomes), k=k, acc=float(rows["acc"].mean()), failures=counts)
    assert failure_counts(pd.DataFrame([row])).to_dict() == failure_table(rows).to_dict()

NO_NUMBERS = [float("nan"), float("inf"), -float("inf"), np.float64("nan"), "many", [], 1e200]

@pytest.mark.parametrize("bad", NO_NUMBERS)
def test_what_is_no_number_is_named_and_never_a_result(bad):
    says = re.escape(repr(bad))
    for f in (mean_interval, sign_flip):
        with pytest.raises(ValueError, match=f"2 is {says}"): f([0.1, None, bad, 0.3])
    with pytest.raises(ValueError): verdict(2.0, bad, 2.5, 5)
    with pytest.raises(ValueError): verdict(2.0, 2.5, bad, 5)
    with pytest.raises(ValueError): censored_ratio([(bad, False), (10, False)], [(10, False), (10, False)])

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.1, None, "0.3"])
def test_holm_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=re.escape(f"p-value {bad!r} of 'b'")): holm(dict(a=0.1, b=bad))

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_resampling_refuses_a_hole_in_the_scores(bad):
    with pytest.raises(ValueError, match="run 1, task 1 is"): stratified_bootstrap([[0.1, 0.2], [0.1, bad]])
    if bad is not None:
        with pytest.raises(ValueError, match="score 1 is"): iqm([0.1, bad])

@pytest.mark.parametrize("bad", [float("inf"), "many"])
def test_a_rate_that_is_no_number_is_named(bad):
    with pytest.raises(ValueError, match=f"rate 1 is {bad!r}"): seed_interval([0.1, bad, 0.3])

def test_little_is_a_defined_result():
    assert sign_flip([]) is None and sign_flip([None]) is None and sign_flip([0, 0.0, -0.0]) == 1.0 and sign_flip([0.3]) == 1.0
    nothing, one = dict(value=None, low=None, high=None, n=0), dict(value=0.3, low=None, high=None, n=1)
    assert mean_interval([]) == mean_interval([None]) == nothing and mean_interval([0.3]) == mean_interval([None, 0.3]) == one
    same = mean_interval([0.25] * 4)
    assert same == dict(value=0.25, low=0.25, high=0.25, n=4)
    assert iqm([]) is None and iqm([0.4]) == 0.4
    assert stratified_bootstrap([[0.4]]) == dict(value=0.4, low=None, high=None, runs=1, tasks=1)
    assert stratified_bootstrap([[0.5], [0.5]], reps=9) | dict(runs=0) == dict(value=0.5, low=0.5, high=0.5, runs=0, tasks=1)
    for empty in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="at least 1 x 1"): stratified_bootstrap(empty)
    with pytest.raises(ValueError, match="reps=0"): stratified_bootstrap([[0.1], [0.2]], reps=0)
    with pytest.raises(ValueError, match="run 1, task 0 is nan"): stratified_bootstrap([[0.1, 0.2], [float("nan"), 0.2]])
    with pytest.raises(ValueError, match="no results"): arm_iqm([])
    with pytest.raises(ValueError, match="2.5 successes of 10"): success_rate(2.5, 10)
    with pytest.raises(ValueError, match="2 rates and 1 counts"): seed_interval([0.1, 0.2], [10])
    assert seed_interval([0.4], [float("nan")])["how"] == "none"

measured = st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(-5, 5), st.booleans())

@quick
@given(st.lists(measured, max_size=10))
def test_a_paired_test_and_its_interval_are_numbers_for_all_that_was_measured(values):
    some = [v for v in values if v is not None]
    p, m = sign_flip(values), mean_interval(values)
    assert m["n"] == len(some) and (p is None) == (not some)
    if some: assert 2 ** -len(some) <= p <= 1 and np.isfinite(m["value"])
    if len(some) > 1: assert m["low"] <= m["value"] <= m["high"] and np.isfinite([m["low"], m["high"]]).all()

@quick
@given(st.lists(st.integers(-100, 100), min_size=2, max_size=10), st.sampled_from([1e-100, 1e-15, 1e-3, 1, 1e100]))
def test_the_unit_of_a_difference_does_not_matter(values, unit):
    ours = sign_flip([v * unit for v in values])
    if not any(values): assert ours == 1.0
    else: assert ours == pytest.approx(stats.permutation_test((np.array(values),), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue)
    x = np.array(values, float) * unit
    if np.ptp(x) > 0:
        low, high = stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
        m = mean_interval(x)
        assert (m["low"], m["high"]) == pytest.approx((low, high), rel=1e-9, abs=1e-12 * unit)

def test_feedback_effect_pairs_attempts_of_the_same_trial():
    def fb(group, attempt, failure, **kw): return roll(failure, mode="feedback", group=group, attempt=attempt, **kw)
    rows = [fb("g1", 0, "x"), fb("g2", 0, None), fb("g3", 0, "x"), fb("g3", 1, "x"), fb("g1", 1, None), fb("g4", 0, "y"), fb("g4", 1, "x"), fb("g5", 0, "y")]
    e = feedback_effect(pd.DataFrame(rows))
    assert e[["kind", "n", "solved", "same", "other"]].values.tolist() == [["x", 2, 1, 1, 0], ["y", 1, 0, 0, 1]]
    seeds = feedback_effect(pd.DataFrame(rows + [r | dict(seed=1) for r in rows]))
    assert seeds["n"].tolist() == [4, 2]
    assert feedback_effect(pd.DataFrame(rows[:1])).empty
    trials = [roll(f, mode="feedback", attempt=a) for f, a in ((None, 0), ("x", 0), ("y", 0), (None, 1), ("y", 1))] # No group: in the order of the file
    assert feedback_effect(pd.DataFrame(trials))[["kind", "solved", "same"]].values.tolist() == [["x", 1, 0], ["y", 0, 1]]

# --- figures

@pytest.fixture
def undrawn(monkeypatch):
    "Figures are made but not drawn: most of a report's time is drawing."
    monkeypatch.setattr(plots, "to_png", lambda fig, dpi=130: b"not drawn")

@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    for arm in plots.ARMS:
        if arm in ("dapo", "dapo_replay", "fg_plan", "fg_replay"): synthetic_run(folder, arm, note=" </pre><script>alert('x')</script> ```` | <img src=http://evil.example/x.png>")
    return folder

def test_figures_say_what_they_show(runs_dir):
    runs = load_runs(runs_dir)
    evals, metrics = frame(runs, "evals"), frame(runs, "metrics")
    curves = plots.learning_curves(evals, bounds=dict(floor=dict(heldout=0.4), ceiling=dict(heldout=0.8, all=0.9)))
    assert [a.get_title(loc="left") for a in curves.axes] == ["Training companies, new requests (n = 20)", "Held-out companies (n = 20)"]
    assert "1 seed" in curves.note and "Wilson interval over tasks, not over seeds" in curves.note
    assert [h.get_label() for h in curves.keys] == ["DAPO", "DAPO + replay (control)", "FG as in the plan", "FG + replay"]
    assert [t.get_text() for t in curves.axes[1].texts] == ["knows nothing: 40%", "knows the rules: 80%"] and not curves.axes[0].texts
    drawn = {l.get_color() for l in curves.axes[0].lines}
    assert drawn == {c for _, c, _ in list(plots.ARMS.values())[:4]}
    bars = plots.efficiency_bars(evals)
    assert any(t.get_text().startswith("> ") for t in bars.axes[0].texts)
    assert [a.get_title(loc="left") for a in plots.gap_curves(metrics).axes] == ["FG as in the plan", "FG + replay"]
    assert len(plots.position_curves(metrics).axes) == 4
    assert plots.to_png(plots.level_bars(evals), 40)[:8] == b"\x89PNG\r\n\x1a\n"
    assert plots.to_png(plots.level_bars(evals), 40) == plots.to_png(plots.level_bars(evals), 40)

def test_the_curve_shows_the_rows(runs_dir):
    evals = frame(load_runs(runs_dir), "evals")
    want = evals[(evals.arm == "fg_replay") & (evals.split == "val")].sort_values("step")
    line = next(l for l in plots.learning_curves(evals).axes[1].lines if l.get_color() == plots.ARMS["fg_replay"][1])
    assert line.get_xdata() == pytest.approx(want["rollouts"]) and line.get_ydata() == pytest.approx(want["acc_heldout"])

# --- reports

class Page(HTMLParser):
    "What a browser would load and run."
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.alts, self.ids, self.links, self.handlers = set(), [], [], [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.add(tag)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "href", "data", "action") and not (tag == "a" and v.startswith("#"))]
        self.handlers += [k for k in a if k.startswith("on")]
        if tag == "img": self.alts.append(a.get("alt"))
        if tag == "a": self.links.append(a["href"])
        if "id" in a: self.ids.append(a["id"])

def test_html_loads_nothing_and_runs_nothing(runs_dir, tmp_path):
    path = write_report(runs_dir, tmp_path, title="<script>alert(1)</script>")
    html = path.read_text()
    page = Page(html)
    assert "script" not in page.tags and not page.handlers and "alert(&#39;x&#39;)" in html
    assert page.loads and all(u.startswith("data:image/png;base64,") for u in page.loads)
    assert not re.search(r"url\(|@import", html)
    assert all(page.alts) and len(page.alts) >= 6
    assert {l[1:] for l in page.links} <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    for need in ("prefers-color-scheme: dark", 'name="viewport"', 'lang="en"', "default-src 'none'", "One seed: no claim", "Synthetic runs", "0123456789ab", "How to read this"): assert need in html
    assert not re.search(r"\b(not )?met\b", re.sub(r"base64,[^\"]*", "", html)) # No claim words without thresholds
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    md = (tmp_path / "report.md").read_text()
    assert set(re.findall(r"\]\(figures/([a-z_]+\.png)\)", md)) == names and "learning_curves.png" in names
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", md)
    assert "alert" not in outside.split("\n", 1)[1] and "<script" not in outside
    assert set(read_json(tmp_path / "metrics.json")) == {"dapo-s0", "dapo_replay-s0", "fg_plan-s0", "fg_replay-s0"}

HOSTILE = dict(
    escape="\x1b[31mred\x1b[0m\x07", null="a\x00b", backspace="safe\b\b\b\bevil", c1="\x9b31m", dollar="costs $5", mathematics=r"$\frac{$ $x_1^2$", pipe="a | b || c",
    backticks="```` `x` ~~~", newline="one\ntwo\r\nthree\rfour", separators="a\u2028b\u2029c\x85d\x0be\x0cf", bidi="abc\u202etxt.exe\u2066", invisible="a\u200bb\ufeffc\xadd",
    surrogate="half \ud83d of one", html="<script>alert(1)</script><img src=x onerror=alert(2)>", comment="<!-- --> <![CDATA[ ]]> &lt;b&gt; &amp;amp;", closing="</pre></td></table></section>",
    link="[click](http://evil.example) ![i](http://evil.example/x.png)", bare="http://evil.example www.evil.example me@evil.example", emphasis="*a* **b** _c_ __d__ ~~e~~", heading="# Not a heading",
    rule="---", item="- not an item", numbered="1. not an item", quote="> not a quote", underscore="_hidden", backslash="a\\", template="{{ 7 * 7 }}{% raw %}", percent="%s %(x)s {0}", blank="   ", csv="=1+1", long="x" * 400)

DRAWN = ("escape", "null", "dollar", "mathematics", "newline", "surrogate", "bidi", "blank", "long") # Where a figure could break

def hostile_run(folder, arm, text):
    "A run whose arm, failures, transcripts and feedback all hold `text`."
    path = synthetic_run(folder, arm)
    manifest = read_json(path / "manifest.json")
    def write(name, rows): (path / name).write_bytes("".join(json.dumps(r) + "\n" for r in rows).encode())
    (path / "manifest.json").write_text(json.dumps(manifest | dict(config=manifest["config"] | dict(arm=text, note=text), argv=["fg-dapo", text], git_commit=text)))
    run = load_runs(path)[0]
    write("rollouts.jsonl", [r | dict(task_id=text, transcript=f"{text}\nCompany: {text}", feedback=text if r["feedback"] else None, failure=r["failure"] and text) for r in run.rollouts])
    write("evals.jsonl", [r | dict(failures={text: sum(r["failures"].values())}) for r in run.evals])
    write("eval_rollouts.jsonl", [r | dict(failure=r["failure"] and text, transcript=text, task_id=text + r["task_id"]) for r in run.eval_rollouts])
    return path

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("error::UserWarning:matplotlib", "ignore:constrained_layout", "ignore:Glyph")
def test_hostile_text_stays_text_in_a_report(kind, tmp_path, monkeypatch):
    text, calm = HOSTILE[kind], "calm"
    if kind == "surrogate": # No file of ours holds one: our writer puts a sign in its place, and the reader names a foreign file that does
        with pytest.raises(ValueError, match=r"manifest\.json:1: half of a surrogate pair"): hostile_run(tmp_path, "mine", text)
        return
    pages, drawn = [], plots.to_png
    monkeypatch.setattr(plots, "to_png", lambda fig, dpi=130: drawn(fig, 20) if pages and kind in DRAWN else b"not drawn") # Drawing is slow
    for name, of in (("calm", calm), ("hostile", text)):
        runs = [hostile_run(tmp_path / name, "mine", of), synthetic_run(tmp_path / name, "dapo")]
        html = write_report(runs, tmp_path / f"out-{name}", title=f"Report on {of}").read_text(encoding="utf-8")
        pages.append((Page(html), html, (tmp_path / f"out-{name}" / "report.md").read_text(encoding="utf-8")))
    (page0, html0, md0), (page, html, md) = pages
    assert not INVISIBLE.search(html) and not INVISIBLE.search(md)
    assert page.tags == page0.tags and not page.handlers and page.ids == page0.ids and all(u.startswith("data:image/png;base64,") for u in page.loads)
    assert skeleton(md) == skeleton(md0)
    if kind in ("escape", "null", "surrogate"): assert text.encode("unicode_escape").decode()[:8] in html # Spelled out, not lost
    if kind == "dollar": assert "costs \\$5" in md and "costs $5" in html

def skeleton(md):
    "What a Markdown reader makes of a page, less its words."
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(md)
    inside = [c.type for t in tokens for c in t.children or [] if c.type not in ("text", "softbreak", "text_special")]
    return [t.type for t in tokens], inside

@quick
@given(st.text(st.characters(codec=None), max_size=40))
def test_escaped_text_is_one_paragraph_of_itself(text):
    "Read back by a Markdown reader, a line is the text that was shown, and nothing else."
    shown = md_line("x" + text) # Something to see, whatever comes
    assert not INVISIBLE.search(shown) and "\n" not in shown
    [start, inline, end] = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(shown)
    assert start.type == "paragraph_open" and {c.type for c in inline.children} <= {"text", "text_special"}
    assert "".join(c.content for c in inline.children) == plots.shown_text("x" + text.replace("\n", " ")).strip()

@pytest.mark.parametrize("kind", HOSTILE)
def test_an_escaped_line_alone_is_a_paragraph(kind):
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(md_line(HOSTILE[kind]))
    assert [t.type for t in tokens] in (["paragraph_open", "inline", "paragraph_close"], [])

def test_an_arm_with_an_underscore_is_in_the_legend():
    fig = plots.learning_curves(pd.DataFrame([dict(arm=a, seed=0, split="val", mode="cold", temperature=1.0, step=s, rollouts=8 * s, acc_heldout=.1 * s, n_heldout=50, acc=.1) for a in ("_mine", "dapo") for s in (0, 1)]))
    assert [t.get_text().strip() for t in fig.legends[0].get_texts()] == ["DAPO", "_mine"]

def test_markdown_fence_outlasts_the_text():
    assert md_block(code("t", "a ````` b")).count("`" * 6) == 2

def test_answer_is_computed_from_the_rows(runs_dir, undrawn):
    runs = load_runs(runs_dir)
    last = {r.arm: [e for e in r.evals if (e["split"], e["mode"], e["temperature"]) == ("test", "cold", 1.0)][-1] for r in runs}
    got = final_rates(frame(runs, "evals"))
    for arm, row in last.items():
        assert got[arm]["training"]["mean"] == row["acc_training_companies"] and got[arm]["heldout"]["mean"] == row["acc_heldout"] and got[arm]["training"]["n"] == 50
    md = to_markdown("t", build_report(runs))
    assert f"{last['fg_replay']['acc_training_companies']:.0%} (" in md

def test_claims_need_thresholds_and_seeds(tmp_path, undrawn):
    for seed in range(5):
        for arm in ("dapo_replay", "fg_replay"): synthetic_run(tmp_path / "runs", arm, seed)
    md = to_markdown("t", build_report(load_runs(tmp_path / "runs"), claims=dict(cold_training=0.1, cold_heldout=0.99, ratio_90=2)))
    rows = [l for l in md.splitlines() if l.endswith(("| met |", "| not met |", "| not measured |"))]
    assert [l.split("|")[-2].strip() for l in rows] == ["met", "not met", "not measured"] and "no claim" not in md
    with pytest.raises(ValueError, match="no claim 'speed'"): build_report(load_runs(tmp_path / "runs"), claims=dict(speed=1))

@pytest.mark.parametrize("version", [1, 2])
def test_a_report_has_the_floor_and_the_ceiling_of_its_world_and_its_version(tmp_path, undrawn, version):
    world = generate_world(4, version=version)
    save_world(world, tmp_path / "data")
    run = synthetic_run(tmp_path / "runs", "fg_replay")
    manifest = read_json(run / "manifest.json")
    write_json(run / "manifest.json", manifest | dict(config=manifest["config"] | dict(data=dict(folder=str(tmp_path / "data")))))
    sections = {s.id: s for s in build_report(load_runs(run), bounds_of_runs(load_runs(run)))}
    [bounds] = [b for b in sections["efficiency"].blocks if b.kind == "table" and b.head[0] == "policy"]
    played = floor_and_ceiling(world, "val+test")
    assert bounds.head == ("policy", *played["floor"]) and {"cooperative", "clarifying", "difficult", "level 5", "heldout"} < set(bounds.head)
    assert [r[1:] for r in bounds.rows] == [tuple(f"{x:.0%}" for x in played[k].values()) for k in ("floor", "ceiling")]
    def versions(m):
        write_json(run / "manifest.json", m)
        return [b.text for b in build_report(load_runs(run))[-2].blocks if b.text.startswith("World version")]
    assert versions(manifest)[0].startswith("World version 1.") and versions(manifest | dict(world_version=2))[0].startswith("World version 2.")

def test_success_is_told_apart_by_the_users_behaviour(tmp_path, undrawn):
    run = synthetic_run(tmp_path / "runs", "fg_replay")
    rows = frame(load_runs(run), "eval_rollouts")
    shown = users_table(rows[rows["mode"] == "cold"])
    assert shown.head == ("arm", "clarifying", "cooperative", "difficult")
    for kind, cell in zip(shown.head[1:], shown.rows[0][1:]):
        some = [r["acc"] for r in load_runs(run)[0].eval_rollouts if r["mode"] == "cold" and r["behavior"] == kind]
        w = success_rate(sum(some), len(some))
        assert cell == f"{w['rate']:.0%} ({100 * w['low']:.0f} to {100 * w['high']:.0f}), n = {len(some)}"
    assert users_table(rows.drop(columns="behavior")) is None and "| arm | clarifying | cooperative | difficult |" in to_markdown("t", build_report(load_runs(run)))

def test_one_arm_missing_files_and_a_run_that_was_killed(tmp_path, undrawn):
    bare = tmp_path / "bare" / "dapo-s3"
    write_json(bare / "manifest.json", dict(config={}, seed=3))
    html = write_report(bare, tmp_path / "out0").read_text()
    assert "Run `fg-dapo evaluate`" in html and load_runs([bare])[0].arm == "dapo"
    killed = synthetic_run(tmp_path / "killed", "fg_replay", finished=False)
    html = write_report([killed], tmp_path / "out1").read_text()
    assert "Unfinished: FG + replay, seed 0, at step 10 of 20" in html and "Only one side of the comparison" in html
    for name in ("evals.jsonl", "rollouts.jsonl"):
        (killed / name).unlink()
        assert write_report(killed, tmp_path / "out2").exists()
    (killed / "metrics.jsonl").unlink()
    assert write_report(killed, tmp_path / "out3").exists()
    mine = synthetic_run(tmp_path / "mine", "my_idea")
    (mine / "eval_rollouts.jsonl").unlink()
    assert "my_idea" in write_report(mine, tmp_path / "out4").read_text()

def test_loading_names_what_is_wrong(tmp_path):
    lone = tmp_path / "runs" / "fg_replay-s0"
    lone.mkdir(parents=True)
    (lone / "metrics.jsonl").write_text("")
    for path in (lone, tmp_path / "runs", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="has no manifest.json.*fg-dapo train") as e: load_runs([path])
    with pytest.raises(ValueError, match="no run folders given"): load_runs([])
    a, b = synthetic_run(tmp_path / "a"), synthetic_run(tmp_path / "b")
    with pytest.raises(ValueError, match="two runs of arm 'fg_replay' with seed 0"): load_runs([a, b])
    assert len(load_runs([a, a.parent])) == 1
    (a / "evals.jsonl").write_text('{"step": \n{"step": 1}\n')
    with pytest.raises(ValueError, match="evals.jsonl:1: not JSON"): load_runs(a)

def test_a_resumed_run_counts_each_step_once(tmp_path):
    run = synthetic_run(tmp_path, steps=6, every=2)
    rows = load_runs(run)[0]
    append_jsonl(run / "metrics.jsonl", rows.metrics[3] | dict(loss=7.0)) # Resumed at step 4, and not further yet
    append_jsonl(run / "evals.jsonl", rows.evals[-1] | dict(acc=0.123))
    append_jsonl(run / "rollouts.jsonl", rows.rollouts[-1] | dict(score=0.5))
    again = load_runs(run)[0]
    assert [r["step"] for r in again.metrics] == [1, 2, 3, 4] and again.metrics[-1]["loss"] == 7.0
    assert len(again.evals) == len(rows.evals) and 0.123 in [r["acc"] for r in again.evals]
    assert len(again.rollouts) == len(rows.rollouts)

def test_the_example_is_a_group_that_feedback_turned(runs_dir):
    run, rows = example_group(load_runs(runs_dir))
    assert run.arm == "fg_replay" and [r["position"] for r in rows] == list(range(8))
    assert not rows[0]["acc"] and rows[-1]["acc"] and rows[-1]["guided"] and rows[0]["step"] == max(r["step"] for r in run.rollouts)

def test_synthetic_folders_are_marked_and_repeatable(tmp_path):
    a, b = synthetic_run(tmp_path / "a", seed=4), synthetic_run(tmp_path / "b", seed=4)
    assert read_json(a / "manifest.json")["synthetic"] is True
    for f in a.iterdir(): assert f.read_bytes() == (b / f.name).read_bytes()
