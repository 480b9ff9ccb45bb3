"""Findings and documents: every table by hand, nothing measured, one seed, five seeds, missing arms, and documents that are in step with the result files."""
import json, re, shutil, struct
from statistics import mean
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fg_dapo.evaluation.documents as documents
import fg_dapo.matrix as matrix
from fg_dapo.cli import app, explain
from fg_dapo.config import check_config
from fg_dapo.core import read_json, read_jsonl
from fg_dapo.evaluation.documents import (DOCUMENTS, HEADLINE, INJECTED, NOT_MEASURED, THEMES, check, clean, complete, confirmations_table, decided, drawn_arms, figures_of, headline, judged, ordinal, page_of, parameters_of, pictures, related_words, render, verdict_counts,
    run_notebook, shown_by, write_document)
from fg_dapo.evaluation.findings import (Evidence, Picture, behaviour_table, cost_of, cost_table, curve_figure, curve_points, dead_groups_table, difference_figure, difference_table, differences, effect_figure,
    effect_table, ending_table, episodes_of, failure_change_table, failure_figure, failure_share_table, failure_shares, gap_figure, gather, ceiling_of, group_table, hole_table, invented_result, kind_words, kinds_in, level_figure, level_table, limit_table, pass_table_of, planned_runs,
    planned_table, position_figure, ratio_table, reach_figure, reference_arm, removal, seeds_words, spent_table, told_table, tuned, tuning_table)
from fg_dapo.evaluation.plots import COMPANIES, arm_label
from fg_dapo.evaluation.report import md_block
from fg_dapo.agent.first_bounds import play_first_bounds
from fg_dapo.evaluation.metrics import check_protocol, cold_rate
from fg_dapo.world.generate import generate_world, told_ceiling, told_chance
from fg_dapo.evaluation.synthetic import synthetic_run
from fg_dapo.matrix import load_results, save_result

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
NOTEBOOKS = sorted({d.notebook for d in DOCUMENTS.values()})
def criterion(id, group="issue", **kw): return dict(id=id, group=group, text=kw.pop("text", id), ours="fg_replay") | kw
PROTOCOL = dict(min_seeds=5, curve=dict(split="val", temperature=1.0, companies="training", hold=2), early_steps=[1, 5], late_steps=5, criteria=[
    criterion("dapo_30", text="Rollouts to 30%, DAPO", measure="ratio", of="rollouts", to=.3, reference="dapo", at_least=10, above=3),
    criterion("dapo_50", measure="ratio", of="rollouts", to=.5, reference="dapo", at_least=5, above=3),
    criterion("control_30", text="Rollouts to 30%, the control", measure="ratio", of="rollouts", to=.3, reference="dapo_replay", at_least=5, above=1.5),
    criterion("control_50", measure="ratio", of="rollouts", to=.5, reference="dapo_replay", at_least=2.2, above=1.5),
    criterion("seconds_dapo", measure="ratio", of="seconds", to=.5, reference="dapo", at_least=1, above=1),
    criterion("cold_training", measure="cold", companies="training", at_least=.9), criterion("level_4", measure="cold", companies="training", levels=[4], at_least=.6),
    criterion("position_8", measure="position_gain", at_least=.4), criterion("empty_is_control", measure="overlap", companies="training", ours="fg_empty", reference="dapo_replay"),
    criterion("two_hours", measure="hours", cores=2, at_most=2), criterion("plan_base", "minimum", measure="growth", at_least=0, above=0),
    criterion("easy_dapo", "easy world", measure="difference", world="easy", companies="training", reference="dapo", at_least=0)]) # Small, and not the one that decides
RULES = dict(min_seeds=5, curve=dict(companies="training", hold=2), early_steps=[1, 2], late_steps=2, criteria=[])
MODES = ("confirm", "explore", "ablate", "tune")

def folders_of(root): return {h: root / f"matrix_{h}" for h in MODES}

def committed(root=EXPERIMENTS): return gather(load_results, root / "protocol.yaml", **folders_of(root))

def save(root, heap, results):
    for r in results: save_result(root / f"matrix_{heap}" / "results" / f"{r['name']}.json", r)

def confirmed(arm, seed, curve, solved=8, world="standard-200", **kw): return invented_result(arm, seed, curve, solved, world, "confirmation", not arm.startswith("dapo"), **kw)

FAST, NEVER, SLOW = (.1, .4, .6) + (.6,) * 9, (.1,) * 12, (.1, .1, .1, .1, .4) + (.4,) * 7
FIVE = [confirmed(a, s, c, k) for a, c, k in (("dapo", NEVER, 2), ("dapo_replay", SLOW, 5), ("fg_replay", FAST, 9)) for s in range(5)]

def evidence(confirm=(), explore=(), ablate=(), tune=(), **kw): return Evidence(list(confirm), list(explore), list(ablate), list(tune), PROTOCOL, **kw)

def cells(block, *keys): # The rest of the one row that begins with `keys`
    rows = [r[len(keys):] for r in block.rows if r[:len(keys)] == keys]
    assert len(rows) == 1, f"{len(rows)} rows begin with {keys}: {block.rows}"
    return rows[0]

# Tables by hand

TWO = [invented_result("dapo", s, (.1, .1, .2, .2), 2 + s, guided=False) for s in (0, 1)] + [invented_result("fg_replay", s, (.1, .4, .4, .6), 6 + 2 * s) for s in (0, 1)]

def test_the_end_by_hand():
    assert cells(ending_table(TWO), "standard-100", "FG + replay") == ("2", "896", *["70% (60 to 80)"] * 2, "78% (67 to 89)", "88% (75 to 100)", *["70% (60 to 80)"] * 2, "80% (70 to 90)") # The ceilings are .9 and .8
    assert cells(ending_table(TWO), "standard-100", "DAPO") == ("2", "896", *["25% (20 to 30)"] * 2, "28% (22 to 33)", "31% (25 to 37)", *["25% (20 to 30)"] * 2, "35% (30 to 40)")
    assert "n = 50 episodes" in ending_table(TWO).text and "range of two seeds" in ending_table(TWO).text and "exploration, not a result; 2 seeds" in ending_table(TWO).text
    assert cells(level_table(TWO), "standard-100", "DAPO") == ("2", *["25% (20 to 30)"] * 5)

def test_what_limits_the_end_by_hand():
    assert cells(limit_table([*TWO, invented_result("fg_plan", changes={"algorithm.transfer.mode": "none"})]), "standard-100", "FG + replay") == ("2", "7", "7", *["70% (60 to 80)"] * 2, "78% (67 to 89)", "88% (75 to 100)") # The ceilings are .9 and .8
    assert [r[1] for r in limit_table([invented_result("fg_plan", changes={"algorithm.transfer.mode": "none"})]).rows] == [] # It replays nothing
    assert "What limits the end" in render("RESULTS.md", page_of("RESULTS.md", evidence(FIVE, TWO))) and "In the confirmations:" not in render("RESULTS.md", page_of("RESULTS.md", evidence((), TWO)))

def test_what_the_training_plans_tell_stands_beside_what_was_reached():
    t = told_table(TWO)
    assert [r[1] for r in t.rows] == ["the rules", "training plans, by majority", "training plans, drawn as often as they occur", "FG + replay, temperature 1", "FG + replay, greedy"] # DAPO replays nothing
    assert cells(t, "standard-100", "the rules") == ("90%", "80%") and cells(t, "standard-100", "FG + replay, temperature 1") == ("70% (60 to 80)",) * 2
    world = generate_world(100, version=1)
    for words, of in ("by majority", told_ceiling(world)), ("drawn as often as they occur", told_chance(world)): assert cells(t, "standard-100", f"training plans, {words}") == (f"{of['training']:.0%}", f"{of['heldout']:.0%}")
    assert "exploration, not a result; 2 seeds" in t.text
    with pytest.raises(ValueError, match="show them apart"): told_table([*TWO, *FIVE])

def test_what_was_spent_by_hand():
    assert cells(spent_table(TWO, RULES), "standard-100", "FG + replay") == ("256 (2 of 2)", "> 768 (0 of 2)", "> 768 (0 of 2)", "> 768 (0 of 2)") # .6 is there only once
    once = RULES | dict(curve=dict(hold=1))
    assert cells(spent_table(TWO, once, "seconds"), "standard-100", "FG + replay") == ("20 (2 of 2)", "60 (2 of 2)", "> 60 (0 of 2)", "> 60 (0 of 2)")
    assert cells(ratio_table(TWO, once, references=["dapo"]), "standard-100", "DAPO ÷ FG + replay") == ("2", "at least 3.0× (from 3.0)", "at least 1.0× (from 1.0)", "undetermined", "undetermined")

def test_inside_a_group_by_hand():
    # Seven steps; position 1 grows from .1 to .6, position 2 is .3 above; cold rows .1 + .02 a step, guided rows .6
    row = cells(group_table(TWO, RULES), "standard-100", "FG + replay")
    assert row == ("2", "14% / 44%", "56% / 86%", "+30 points (+30 to +30)", "+47 points (+47 to +47)", "+37 points (+37 to +37)")
    assert cells(group_table(TWO, RULES), "standard-100", "DAPO")[3:] == ("+0 points (+0 to +0)", "not measured", "not measured")
    assert cells(group_table([r for r in TWO if r["seed"] == 0], RULES), "standard-100", "FG + replay")[3] == "+30 points"
    assert cells(group_table(TWO, RULES | dict(early_steps=[1, 6])), "standard-100", "FG + replay")[2] == "not measured" # No late part that is not early, too

def test_failures_by_hand():
    rs = [invented_result("dapo_replay", s, solved=4) for s in (0, 1)] + [invented_result("fg_replay", s, solved=8 + s) for s in (0, 1)]
    t = failure_share_table(rs) # 6 of 10 fail, in turn; 2 and 1 of 10
    assert cells(t, "standard-100", "missing auth") == ("30% (30 to 30)", "10% (10 to 10)") and cells(t, "standard-100", "wrong order") == ("30% (30 to 30)", "5% (0 to 10)")
    assert cells(failure_change_table(rs), "standard-100", "wrong order") == ("2", "30%", "5%", "-25 points (-89 to +39)") # -.2 and -.3; t = 12.706
    row = cells(effect_table(rs), "standard-100", "FG + replay", "missing auth") # 14 of 20
    assert row == ("20", "14", "4", "2", "70% (48 to 85)", "undecided")
    assert [removal(dict(low=a, high=b)) for a, b in ((.51, .9), (.1, .49), (.4, .6))] == ["mostly", "mostly not", "undecided"]

def test_differences_by_hand():
    rs = [invented_result("fg_replay", s, solved=8) for s in range(3)] + [invented_result("hint", s, solved=5 + s, changes={"algorithm.feedback_guidance.detail": "hint"}) for s in range(3)]
    assert cells(difference_table(rs, "fg_replay"), "standard-100", "hint") == ("detail: hint, not full", "3", "-20 points (-45 to +5)", "0.250", "0.250", "-20 points (-45 to +5)") # -.3, -.2, -.1; t = 4.303
    assert differences(rs, "absent") == [] and differences([], "fg_replay") == []
    assert [r["n"] for r in differences([*rs[:3], *rs[5:]], "fg_replay")] == [1] # Only pairs count

def test_reliability_cost_and_stalling_by_hand():
    assert cells(pass_table_of(TWO), "standard-100", "DAPO", kind_words("heldout")) == ("10", "50% (50 to 50)", "75% (75 to 75)", "50% (50 to 50)", "25% (25 to 25)")
    assert pass_table_of([dict(r, passes={}) for r in TWO]).rows == ()
    assert cells(behaviour_table(TWO), "standard-100", "DAPO") == ("2", "90% (90 to 90)", "80% (80 to 80)", "100% (100 to 100)")
    c = cost_of(TWO) # 4 runs of 7 steps
    assert (c["runs"], c["rollouts"], c["rollouts_guided"], c["updates"], c["hours"]) == (4, 4 * 896, 4 * 672, 240, pytest.approx(480 / 3600))
    assert cells(cost_table(TWO), "all", "all") == ("4", "3,584", "896", "2,688", "32", "0", "36,000", "240", "160", "–", "400", "0.1") # Runs that did not count trials apart
    assert cost_of([*TWO[1:], dict(TWO[0], ledger=TWO[0]["ledger"] | dict(trials=7))])["trials"] == 7
    assert cells(dead_groups_table(TWO), "standard-100", "DAPO") == ("2", "25% (25 to 25)", "7")
    assert cost_table([]).rows == () and cost_of([])["rollouts"] == 0

def test_tuning_by_hand(): # From 0.1 at the start to c after 256 rollouts, and c up to 3,000
    rs = [invented_result(f"{f}_{i}", 0, (.1, c), changes={"algorithm.lr": lr}) for f in ("dapo", "fg") for i, c, lr in ((1, .3, 3e-4), (2, .5, 1e-3), (10, .2, 1e-4))]
    t = tuning_table([*rs, invented_result("golf")])
    assert [r[1:] for r in t.rows[:3]] == [("dapo", "dapo_1", "the settings of arms.yaml", "1", "29.1%", ""), ("dapo", "dapo_2", "lr: 0.001, not 0.0003", "1", "48.3%", "yes"), ("dapo", "dapo_10", "lr: 0.0001, not 0.0003", "1", "19.6%", "")]
    assert [r["arm"] for r in tuned(rs) if r["chosen"]] == ["dapo_2", "fg_2"] and tuned([]) == []
    close = [invented_result(f"dapo_{i}", 0, (.1, c)) for i, c in ((1, .3), (2, .305), (3, .2))]
    assert [r["arm"] for r in tuned(close) if r["chosen"]] == ["dapo_1"] # Half a point is noise

def test_planned_ablations_by_hand():
    ablate = [invented_result("fg_replay", s, solved=8) for s in (0, 1)]
    ablate += [invented_result("start", s, solved=6, changes={"algorithm.feedback_guidance.start_rollout": 4, "algorithm.feedback_guidance.wave_sizes": [4]}) for s in (0, 1)]
    ablate += [invented_result("both", s, solved=6, changes={"algorithm.feedback_guidance.detail": "hint", "algorithm.transfer.mode": "none"}) for s in (0, 1)]
    t = planned_table([], ablate)
    assert cells(t, "plain rollouts before feedback", "4") == ("not measured", "standard-100: -20 points (-20 to -20), 2 pairs")
    assert cells(t, "plain rollouts before feedback", "2") == ("not measured", "reference")
    assert cells(t, "detail of feedback", "hint") == cells(t, "transfer", "none") == ("not measured", "not measured") # Two things at once say nothing about one
    confirm = [dict(r, purpose="confirmation") for r in ablate]
    assert cells(planned_table(confirm), "plain rollouts before feedback", "4") == ("standard-100: -20 points (-20 to -20), 2 pairs", "not measured")

def test_the_reference_is_the_arm_that_differs_least():
    rs = [invented_result("x"), invented_result("y", changes={"algorithm.lr": 1.0}), invented_result("z", changes={"algorithm.transfer.mode": "none"})]
    assert reference_arm(rs) == "x" and reference_arm(rs, "z") == "z" and reference_arm([*rs, invented_result("fg_replay")]) == "fg_replay" and reference_arm([]) is None

# Seeds, worlds, purposes

def test_one_seed_has_no_interval_and_says_so():
    one = [r for r in TWO if r["seed"] == 0]
    assert all(i["low"] is None and i["how"] == "none" for _, i in curve_points(one[:1], "acc_training_companies"))
    for fig in (curve_figure(one), position_figure(one, RULES), gap_figure(one), level_figure(one), failure_figure(one)):
        assert "1 seed; no interval" in fig.note and "world standard-100; exploration, not a result" in fig.note
        assert [c for ax in fig.axes for c in ax.collections] == [] and [c for ax in fig.axes for c in ax.containers if type(c).__name__ == "ErrorbarContainer"] == []
    assert "one pair: no interval" in difference_figure(one, "dapo").note
    assert "60%" == cells(ending_table(one), "standard-100", "FG + replay")[2] and "no interval" in ending_table(one).text

def test_more_seeds_have_one():
    for fig, words in ((curve_figure(FIVE), "n = 50 validation tasks"), (level_figure(FIVE), "n: episodes a run"), (failure_figure(FIVE), "n = 100 episodes")):
        assert words in fig.note and "world standard-200; confirmation" in fig.note and "5 seeds; 95% t-interval over seeds" in fig.note
    assert sum(len(ax.collections) for ax in curve_figure(FIVE).axes) == 6 # A band an arm and a panel
    assert "range of two seeds" in curve_figure(TWO).note
    assert seeds_words(FIVE) == "5 seeds" and seeds_words(FIVE[:12]) == "2 to 5 seeds an arm" and seeds_words([]) == "no seed"

def test_the_ceiling_is_drawn():
    fig = curve_figure(FIVE)
    played = play_first_bounds(generate_world(200, version=1), "val+test")
    def drawn(results): return [sorted(t.get_text() for t in ax.texts) for ax in curve_figure(results).axes]
    floors = [f"knows nothing: {played['floor'][c]:.0%}" for c in ("training", "heldout")]
    assert drawn(FIVE) == [[floors[0], "rules, no call first: 90%"], [floors[1], "rules, no call first: 80%", f"rules, one call first: {played['ceiling']['heldout']:.0%}"]]
    known = [dict(r, ceiling=dict(training=.9, heldout=.8, training_known=.95)) for r in FIVE]
    assert drawn(known)[0] == [floors[0], "rules, no call first: 95%"] and ceiling_of(known[0], "seen") is None
    assert .3 < played["floor"]["heldout"] < ceiling_of(FIVE[0], "heldout") # The floor is no small thing here

def test_the_hole_by_hand():
    played = play_first_bounds(generate_world(200, version=1), "val+test")
    top = played["ceiling"]["heldout"]
    [row] = hole_table(FIVE).rows
    mine = [cold_rate(r, "heldout") for r in FIVE if r["arm"] == "fg_replay"]
    assert row[:5] == ("standard-200", f"{played['floor']['all']:.0%}", f"{played['floor']['heldout']:.0%}", "80%", f"{top:.0%}")
    assert [c.split(" ")[0] for c in row[5:]] == [f"{x:.0%}" for x in (mean(mine), mean(mine) / .8, mean(mine) / top)]

def test_a_withdrawn_criterion_decides_nothing_and_says_why():
    def withdrawn(*ids): return dict(PROTOCOL, criteria=[c | (dict(withdrawn="the world had a hole") if c["id"] in ids else {}) for c in PROTOCOL["criteria"]])
    plain, e = evidence(FIVE), Evidence(list(FIVE), [], [], [], withdrawn("control_30", "dapo_30"))
    before, after = ({r["id"]: r for r in judged(x)} for x in (plain, e))
    assert {i for i in before if before[i]["verdict"] != after[i]["verdict"]} == {"control_30", "dapo_30"}
    assert (after["control_30"]["verdict"], after["control_30"]["was"], after["control_30"]["value"]) == ("withdrawn", "not met", before["control_30"]["value"])
    assert decided(headline(plain)) == "not met" and decided(headline(e)) == "met" and decided([after["dapo_30"]]) == "withdrawn"
    assert verdict_counts(judged(e)).endswith(", 2 withdrawn") and "withdrawn" not in verdict_counts(judged(plain))
    body = render("RESULTS.md", page_of("RESULTS.md", e))
    assert "Withdrawn, first confirmation: Rollouts to 30%, the control." in body and "it was not met; withdrawn because the world had a hole" in body
    for bad in ("", "  ", None, True):
        with pytest.raises(ValueError, match="'dapo_30': 'withdrawn' is"): check_protocol(dict(PROTOCOL, criteria=[dict(PROTOCOL["criteria"][0], withdrawn=bad)]))

def test_what_was_withdrawn_is_said_in_every_document_that_shows_it():
    ev = committed()
    got = {h: {r["id"]: r for r in judged(e) if r["verdict"] == "withdrawn"} for h, e in (dict(confirm_1=ev) | ev.later).items()}
    assert {h: list(rs) for h, rs in got.items() if rs} == dict(confirm_1=["plan_within"], confirm_5=["cold_heldout"])
    assert all(c["ours"] != "fg_plan" or c.get("withdrawn") for e in (ev, *ev.later.values()) for c in e.protocol["criteria"] if "ours" in c) # No criterion is about it
    [row] = [r for r in hole_table(ev.later["confirm_5"].confirm).rows]
    assert row[-2:] == ("93% (91 to 95)", "82% (80 to 84)")
    for path in ("RESULTS.md", "paper_outline.md"):
        body = (EXPERIMENTS / path).read_text()
        assert body.count("Withdrawn, ") == 2 and " | ".join(row) in body
    assert "What was withdrawn afterwards" in (EXPERIMENTS / "PROTOCOL.md").read_text()

def test_censored_bars_are_marked():
    fig = reach_figure(FIVE, PROTOCOL)
    texts, hatched = [t.get_text() for t in fig.axes[0].texts], [p.get_hatch() for p in fig.axes[0].patches]
    assert texts[:4] == ["> 2,816, 0 of 5"] * 4 and hatched[:4] == ["////"] * 4 # DAPO
    assert texts[8:10] == ["256, 5 of 5", "512, 5 of 5"] and hatched[8:10] == [None, None] and hatched[10:12] == ["////"] * 2 # Ours

def test_every_world_has_its_panels():
    rs = [*TWO, invented_result("fg_replay", world="easy-101")]
    assert [ax.get_title(loc="left") for ax in curve_figure(rs).axes] == [f"{w}\n{COMPANIES[c][0]}" for w in ("standard-100", "easy-101") for c in ("training", "heldout")]
    assert "worlds standard-100, easy-101" in curve_figure(rs).note and "1 to 2 seeds an arm" in curve_figure(rs).note
    assert len(failure_figure(rs).axes) == 3 and len(effect_figure(rs).axes) == 3

def test_every_kind_of_task_has_its_column_and_the_protocol_says_which_one_counts():
    rs = [invented_result(a, s, c, k, kinds=tuple(COMPANIES)) for a, c, k in (("dapo", (.1, .1, .1), 2), ("fg_replay", (.1, .5, .5), 6)) for s in (0, 1)]
    assert kinds_in(rs) == list(COMPANIES) and kinds_in(TWO) == ["training", "heldout"] and kinds_in([]) == []
    assert len(curve_figure(rs).axes) == len(difference_figure(rs, "dapo").axes) == len(COMPANIES)
    assert list(map(str, ending_table(rs).head))[4:4 + len(COMPANIES)] == [kind_words(c) for c in COMPANIES]
    held = RULES | dict(curve=dict(companies="heldout", hold=1)) # There .5 is .4
    assert cells(spent_table(rs, held), "standard-100", "FG + replay")[:2] == ("256 (2 of 2)", "> 512 (0 of 2)") and kind_words("heldout") in reach_figure(rs, held).note
    for kind in COMPANIES:
        for path in DOCUMENTS: render(path, page_of(path, Evidence([], rs, rs, rs, PROTOCOL | dict(curve=PROTOCOL["curve"] | dict(companies=kind)))))

def test_a_figure_shows_the_arms_that_can_be_told_apart_and_names_the_others():
    many = [invented_result(a, 0, solved=k) for k, a in enumerate(("fg_a", "fg_b", "fg_c", "fg_d", "fg_e", "oracle"))] + TWO
    assert drawn_arms(many) == ["dapo", "fg_replay", "fg_b", "fg_c", "fg_d", "fg_e"] # The lowest is left out, and the limit, however high
    [p] = pictures(lambda rs: level_figure(rs), many, "x", "Success.")
    assert p.text == "Success. Only in the tables: fg_a, oracle."
    [p] = pictures(lambda rs: difference_figure(rs, "dapo"), many, "x", "Differences.", crowded=True)
    assert p.text == "Differences."
    assert drawn_arms(TWO) == ["dapo", "fg_replay"] and pictures(lambda rs: level_figure(rs), TWO, "x", "Success.")[0].text == "Success."

def test_exploration_and_confirmation_are_never_shown_together():
    for f in (curve_figure, failure_figure, ending_table, cost_table):
        with pytest.raises(ValueError, match="results of confirmation and exploration together"): f([*TWO, *FIVE])

def test_a_result_in_the_wrong_heap_is_refused(tmp_path):
    save(tmp_path, "confirm", TWO[:1])
    (tmp_path / "protocol.yaml").write_text((EXPERIMENTS / "protocol.yaml").read_text())
    with pytest.raises(ValueError, match="standard-100-dapo-s0 is a result of 'exploration', and --confirm takes those of 'confirmation'"): committed(tmp_path)

def test_missing_arms_and_torn_results_do_not_fail():
    whole = invented_result()
    for key in ("evals", "steps", "final", "cells", "passes", "effect", "behavioral", "ledger", "wall_seconds", "config", "versions", "git_commit", "ceiling"):
        torn = dict(whole, seed=1, **{key: {} if isinstance(whole[key], dict) else [] if isinstance(whole[key], list) else None})
        e = evidence([dict(r, purpose="confirmation") for r in (whole, torn)], ablate=[whole, torn], tune=[torn])
        for path in ("RESULTS.md", "ablations/analysis.md", *(["analysis/failure_analysis.md", "paper_outline.md"] if key in ("cells", "effect") else ())): assert render(path, page_of(path, e)).startswith(f"# {DOCUMENTS[path].title}\n")
        for f in (curve_figure, failure_figure, effect_figure, gap_figure, level_figure): assert f([torn]) is None or "1 seed" in f([torn]).note
    for arms in (["dapo"], ["fg_replay"], ["fg_replay", "golf"], ["dapo_replay", "fg_empty"]):
        e = evidence([confirmed(a, s, FAST) for a in arms for s in (0, 1)])
        for path in ("RESULTS.md", "ablations/analysis.md"): assert "not measured" in render(path, page_of(path, e))

def test_what_a_matrix_leaves_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "rules_ceiling", lambda world: dict(training=.9, heldout=.8))
    rs, rows = [], {}
    for arm in ("dapo_replay", "fg_replay"):
        c = check_config(dict(arm=arm, seed=0, data=dict(folder=str(ROOT / "data")), train=dict(steps=20), evaluation=dict(split="test")))
        job = matrix.MatrixJob(c, tmp_path, None, matrix.World(100, "standard", (arm,)), "0" * 12, (("purpose", "exploration"), ("policy", "1" * 12), ("world_files", "2" * 12)), False)
        synthetic_run(tmp_path / "runs", arm).rename(job.run)
        rs.append(matrix.collect(job))
        rows[arm] = [r for r in read_jsonl(job.run / "eval_rollouts.jsonl") if r["mode"] == "cold"]
    save(tmp_path, "explore", rs)
    e = evidence(explore=load_results(tmp_path / "matrix_explore"))
    for path in DOCUMENTS: render(path, page_of(path, e))
    for arm, r in zip(rows, e.explore):
        mine = [x["acc"] for x in rows[arm] if not x["heldout"]]
        assert cells(ending_table(e.explore), "standard-100", arm_label(arm))[:3:2] == ("1", f"{sum(mine) / len(mine):.0%}") and episodes_of([r]) == len(mine) == 40
        kinds = [x["failure"] for x in rows[arm] if not x["acc"]]
        assert {k: v[0] for k, v in failure_shares([r]).items()} == {k: pytest.approx(kinds.count(k) / len(rows[arm])) for k in set(kinds)}
        assert cost_of([r])["rollouts"] == 20 * 64 and [p for p, _ in curve_points([r], "acc_heldout")] == [64 * s for s in (0, 4, 8, 12, 16, 20)]

# Words and verdicts

def test_nothing_measured_says_so_everywhere():
    e = evidence()
    for path in DOCUMENTS:
        body = render(path, page_of(path, e))
        assert figures_of(page_of(path, e)) == [] and "not measured" in body.lower()
    results = render("RESULTS.md", page_of("RESULTS.md", e))
    n = len(PROTOCOL["criteria"])
    assert "Verdict on the claim: not measured." in results and f"0 met, 0 not met, {n} not measured" in results and "Nothing was run yet." in results
    assert {r["verdict"] for r in judged(e)} == {"not measured"}
    outline = render("paper_outline.md", page_of("paper_outline.md", e))
    assert "Verdict: not measured." in outline and "2603.04597" in outline and "2601.20802" in outline and outline.count(NOT_MEASURED) == 1 and "Cost: not measured." in outline

def test_a_confirmation_with_met_and_unmet_criteria():
    e = evidence(FIVE)
    by_id = {r["id"]: r for r in judged(e)}
    # Against DAPO 2816 / 256 = 11 and 2816 / 512 = 5.5 at least; against the control 1024 / 256 = 4 and 5.5 at least
    assert [by_id[i]["verdict"] for i in ("dapo_30", "dapo_50", "control_30", "control_50")] == ["met", "met", "not met", "met"]
    assert [by_id[i]["value"] for i in ("dapo_30", "dapo_50", "control_30", "control_50")] == pytest.approx([11, 5.5, 4, 5.5])
    assert (by_id["cold_training"]["verdict"], by_id["level_4"]["verdict"], by_id["easy_dapo"]["verdict"], by_id["position_8"]["verdict"]) == ("met", "met", "not measured", "not met")
    body = render("RESULTS.md", page_of("RESULTS.md", e))
    assert "Verdict on the claim: not met." in body and decided(headline(e)) == "not met"
    assert "Rollouts to 30%, DAPO: met. Needed: at least 10, interval above 3. Measured: at least 11.0× (from 11.0), n = 5. (reached by 5 of 5 runs, by the reference 0)" in body
    assert "Rollouts to 30%, the control: not met. Needed: at least 5, interval above 1.5. Measured: 4.0× (4.0 to 4.0), n = 5." in body
    assert "All 12 criteria of experiments/PROTOCOL.md: 8 met, 2 not met, 2 not measured." in body and "- issue: 7 met, 2 not met, 1 not measured." in body and "- easy world: 0 met, 0 not met, 1 not measured." in body
    table = page_of("RESULTS.md", e)["criteria"].blocks[0]
    issue = [r[-1] for r in table.rows if r[0] == "issue"]
    assert issue == sorted(issue, key=["not met", "not measured", "met"].index) and set(issue) == {"not met", "not measured", "met"} # What is not met comes first
    assert f"Feedback that holds the answer, world standard-200: +40 points (+40 to +40) on {kind_words('training')} against DAPO + replay (control), 5 pairs; the interval lies above zero." in body
    assert related_words(e)[2].endswith(f"The arm dapo here: world standard-200, cold start at the end on {kind_words('training')}: 20% (20 to 20), 5 seeds.") and related_words(e)[0].endswith("not measured.")

def test_the_words_follow_the_numbers():
    better = [*FIVE[:5], *(confirmed("dapo_replay", s, NEVER, 5) for s in range(5)), *FIVE[10:]]
    assert decided(headline(evidence(better))) == "met" and "Verdict on the claim: met." in render("RESULTS.md", page_of("RESULTS.md", evidence(better)))
    few = [r for r in FIVE if r["seed"] < 4]
    body = render("RESULTS.md", page_of("RESULTS.md", evidence(few)))
    assert "Verdict on the claim: not measured." in body and "Some arms have 4 confirming seeds so far. Below 5 nothing is decided." in body

def test_exploration_is_in_its_own_section_and_moves_no_verdict():
    e = evidence(explore=[dict(r, purpose="exploration") for r in FIVE], ablate=TWO, tune=TWO)
    assert {r["verdict"] for r in judged(e)} == {"not measured"}
    page = page_of("RESULTS.md", e)
    assert [id for id, s in page.items() if any(b.kind == "figure" for b in s.blocks)] == ["explore"] and "Exploration" in page["explore"].title
    assert all("exploration, not a result" in b.alt for b in figures_of(page)) and all("_explore_" in b.name for b in figures_of(page))

def test_an_incomplete_matrix_is_named_and_its_hours_are_not_decided():
    names = [r["name"] for r in FIVE]
    whole, part = evidence(FIVE, planned=tuple(names)), evidence(FIVE[:-1], planned=tuple(names))
    verdict = lambda e: next(r for r in judged(e) if r["id"] == "two_hours")
    assert verdict(whole)["verdict"] == "met" and "all 15 runs are there" in render("RESULTS.md", page_of("RESULTS.md", whole))
    assert (verdict(part)["verdict"], verdict(part)["note"]) == ("not measured", "14 of 15 runs are there")
    assert "14 of 15 runs are there. Missing: standard-200-fg\\_replay-s4." in render("RESULTS.md", page_of("RESULTS.md", part))

def test_the_planned_runs_are_those_of_the_matrix():
    from fg_dapo.matrix import load_matrix
    m = load_matrix(EXPERIMENTS / "configs/matrix_confirm.yaml")
    assert planned_runs(m.path) == tuple(f"{w.name}-{a}-s{s}" for s in m.seeds for w in m.worlds for a in w.arms) and planned_runs("none.yaml") == ()

def test_later_confirmations_are_reported_beside_the_first(tmp_path):
    again = [confirmed(a, s, c, k, "standard-201") for a, c, k in (("dapo", NEVER, 2), ("fg_replay", FAST, 9)) for s in range(5)]
    third = [confirmed("fg_replay", s, FAST, 5, "standard-202") for s in range(5)]
    for heap, rs in dict(confirm=FIVE, confirm_2=again, confirm_3=third).items(): save(tmp_path, heap, rs)
    def some(why, *ids): return dict(PROTOCOL, why=why, criteria=[c for c in PROTOCOL["criteria"] if c["id"] in ids])
    rules = dict(protocol=PROTOCOL, protocol_2=some("The first left this open.", "dapo_30", "level_4"), protocol_3=some("The second found the cause.", "level_4") | dict(deviation="A run died."))
    rules["protocol_3"]["criteria"] += [c | dict(id="level_9", text="level_9") for c in rules["protocol_3"]["criteria"]] # Asked for the first time
    for name, p in rules.items(): (tmp_path / f"{name}.yaml").write_text(json.dumps(p))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/matrix_confirm_2.yaml").write_text("seeds: [0, 1, 2, 3, 4, 5]\nworlds: [{seed: 201}]\narms: {dapo: {}, fg_replay: {}}\n")
    e = committed(tmp_path)
    second, last = e.later["confirm_2"], e.later["confirm_3"]
    assert list(e.later) == ["confirm_2", "confirm_3"] and not second.later and list(e.heaps) == ["confirm", "confirm_2", "confirm_3", "explore", "ablate", "tune"]
    assert (len(e.confirm), len(second.confirm), len(second.missing), len(last.confirm), last.planned) == (15, 10, 2, 5, ())
    assert [r["id"] for r in judged(second)] == ["dapo_30", "level_4"] and [r["id"] for r in judged(last)] == ["level_4", "level_9"] and judged(e) == judged(evidence(e.confirm)) # Nothing of them decides the first
    page = page_of("RESULTS.md", e)
    text = render("RESULTS.md", page)
    sections = list(page)
    assert sections[sections.index("easy") + 1:][:2] == ["second", "third"] and "The first left this open." in text and "The second found the cause." in text and "10 of 12 runs are there" in text
    for heap, world, id in (("confirm_2", "standard-201", "second"), ("confirm_3", "standard-202", "third")):
        rows, counts = judged(e.later[heap]), f"experiments/protocol{heap.removeprefix('confirm')}.yaml: {verdict_counts(judged(e.later[heap]))}."
        for shown in (page[id], page_of("paper_outline.md", e)[id]): # Its criteria, and no other
            asked = next(b.rows for b in shown.blocks if b.kind == "table" and b.head[0] == "from")
            assert len(asked) == len(rows) and {r[1]: r[-1] for r in asked} == {r["text"]: r["verdict"] for r in rows}
            assert [b.text for b in shown.blocks if b.text.startswith("Otherwise than written")] == (["Otherwise than written: A run died."] if id == "third" else [])
        assert f"All {len(rows)} criteria of {counts}" in [b.text for b in page[id].blocks] and f"The {id} confirmation, its criteria in {counts}" in [b.text for b in page["claim"].blocks]
        assert {b.name for b in figures_of(page) if heap in b.name} and all(world in b.name for b in figures_of(page) if heap in b.name)
    assert not {"second", "third"} & set(page_of("RESULTS.md", evidence(FIVE)))
    every = next(b for b in page["criteria"].blocks if b.kind == "table" and b.head[0] == "criterion")
    asked = [{r["text"]: r["verdict"] for r in judged(x)} for x in (e, second, last)]
    assert every.head == ("criterion", "needed", "first", "second", "third") and [row[0] for row in every.rows] == [*asked[0], "level_9"]
    for text, _, *cells in every.rows: assert [cell.split(":")[0] for cell in cells] == [of.get(text, "not asked") for of in asked]
    level = next(row for row in every.rows if row[0] == "level_4")
    assert level[2:] == ("met: 90% (90 to 90), n = 5", "met: 90% (90 to 90), n = 5", "not met: 50% (50 to 50), n = 5")

# Figures as files

def chunks(png):
    "The kinds of chunk in a PNG."
    at, out = 8, []
    while at < len(png):
        n, kind = struct.unpack(">I4s", png[at:at + 8])
        out.append(kind.decode())
        at += 12 + n
    return out

def test_pictures_are_small_and_the_same_every_time():
    many = [confirmed(a, s, tuple(min(1, .05 + .02 * j * i + .01 * s) for i in range(12)), 3 + s) for j, a in enumerate(("dapo", "dapo_replay", "fg_plan", "fg_replay", "fg_observed", "fg_shuffled", "fg_empty", "golf", "sdpo_gated")) for s in range(5)]
    png = [Picture(curve_figure(many), "x", "").png for _ in range(2)]
    assert png[0] == png[1] and png[0][:8] == b"\x89PNG\r\n\x1a\n" and not {"tEXt", "iTXt", "zTXt", "tIME"} & set(chunks(png[0])) and len(png[0]) < 150_000
    assert Picture(curve_figure(many), "x", "").alt.startswith("Cold-start success while training. world standard-200; confirmation")

def test_committed_figures_are_small():
    assert [p.name for p in (EXPERIMENTS / "figures").glob("*.png") if p.stat().st_size >= 150_000] == []

# Documents in step

def test_the_readme_says_what_the_result_files_say():
    ev, readme = committed(), (ROOT / "README.md").read_text()
    assert md_block(confirmations_table(ev, ids=HEADLINE)) in readme and {c for e in (ev, *ev.later.values()) for c in (x["id"] for x in e.protocol["criteria"])} >= set(HEADLINE)
    [fifth] = hole_table(ev.later["confirm_5"].confirm).rows
    assert f"verdict on held-out companies is withdrawn.** {fifth[5]} was {fifth[6]} of the ceiling as it was, and is {fifth[7]} of the rules with one call first." in readme
    floors = [r[1] for r in hole_table([r for e in (ev, *ev.later.values()) for r in e.confirm if r["world"]["kind"] == "standard"]).rows]
    assert f"solves {min(floors)} to {max(floors)} of all tasks" in readme and len(re.findall(r"[^\W\d_][\w'-]*", re.sub(r"(?s)```.*?```", "", readme))) <= 1500
    for heap, e in (dict(confirm_1=ev) | ev.later).items():
        rows = judged(e)
        assert f"- The {ordinal(heap)}: of {len(rows)} criteria {verdict_counts(rows)}. {complete(e).text}" in readme

def test_every_criterion_has_one_theme_of_the_outlines_abstract():
    ev = committed()
    every = [c for e in (ev, *ev.later.values()) for c in e.protocol["criteria"]]
    assert len(every) > 70 and [c["id"] for c in every if sum(of(c) for of in THEMES.values()) != 1] == []

def test_the_committed_documents_are_what_the_result_files_give():
    assert check(committed(), EXPERIMENTS) == [], "fg-dapo results"

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Experiments with invented results, and the documents that belong to them."
    root = tmp_path_factory.mktemp("made")
    for name in (*NOTEBOOKS, "protocol.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXPERIMENTS / name, root / name)
    save(root, "confirm", [*FIVE[3:5], *FIVE[13:]])
    for path in DOCUMENTS: write_document(path, page_of(path, committed(root)), root)
    return root

@pytest.fixture
def copy(made, tmp_path):
    "A copy of them."
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)

def differing(root): return [x for x in check(committed(root), root) if ".ipynb" not in x] # The notebooks of the copy still show other results

def test_a_number_changed_by_hand_is_found(copy):
    assert differing(copy) == []
    for path in ("RESULTS.md", "analysis/failure_analysis.md", "paper_outline.md"):
        old = (copy / path).read_text()
        i = [m.start() for m in re.finditer(r"\d", old)][-1 if path == "RESULTS.md" else 40]
        (copy / path).write_text(old[:i] + str((int(old[i]) + 1) % 10) + old[i + 1:])
        assert differing(copy) == [f"{path}: not what the result files give"]
        (copy / path).write_text(old)
    (copy / "baseline/analysis.md").unlink()
    assert differing(copy) == ["baseline/analysis.md: is missing"]

def test_a_result_that_came_later_is_found(copy):
    save(copy, "explore", TWO[:1])
    assert "RESULTS.md: not what the result files give" in differing(copy) and any(x.startswith("figures/") and x.endswith("is missing") for x in differing(copy))

def test_missing_and_forgotten_figures_are_found(copy):
    some = sorted((copy / "figures").glob("*.png"))
    assert len(some) > 8
    (copy / "figures/old.png").write_bytes(some[0].read_bytes())
    some[0].unlink()
    assert differing(copy) == [f"figures/{some[0].name}: is missing", "figures/old.png: belongs to no document"]

def test_every_link_to_a_figure_leads_to_one(copy):
    for path in DOCUMENTS:
        links = re.findall(r"\]\(([^)#]*figures/[^)]*)\)", (copy / path).read_text())
        assert [x for x in links if not ((copy / path).parent / x).is_file()] == []
        if path in ("RESULTS.md", "baseline/analysis.md", "analysis/failure_analysis.md"): assert links

# Notebooks

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_are_clean_and_have_parameters(name):
    text = (EXPERIMENTS / name).read_text()
    nb = json.loads(text)
    text = re.sub(r"\"image/png\": \"[^\"]*\"", "", text) # Its letters may spell anything
    assert clean(nb) == nb and not re.search(r"papermill\"|\"execution_count\": \d|\d\d:\d\d:\d\d|0x[0-9a-f]{6}", text)
    assert set(parameters_of(nb)) == {"confirm", "explore", "ablate", "tune", "experiments"} and sum(c["metadata"].get("tags") == ["parameters"] for c in nb["cells"]) == 1
    assert not any(INJECTED in c["metadata"].get("tags", []) for c in nb["cells"])
    assert nb["cells"][0]["cell_type"] == "markdown" and "".join(nb["cells"][0]["source"]).startswith("# ") and any(c.get("outputs") for c in nb["cells"])

def test_a_changed_output_of_a_notebook_is_found(copy):
    bad = check(committed(copy), copy)
    assert "baseline/baseline.ipynb: its outputs are not what the result files give" in bad

def test_a_notebook_runs_through_papermill(copy):
    path, doc = copy / "baseline/baseline.ipynb", copy / "baseline/analysis.md"
    doc.unlink()
    shutil.rmtree(copy / "figures")
    (copy / "matrix_confirm").rename(copy / "elsewhere")
    e = gather(load_results, copy / "protocol.yaml", **folders_of(copy) | dict(confirm=copy / "elsewhere"))
    page = page_of("baseline/analysis.md", e)
    run_notebook(path, dict(confirm="../elsewhere", explore="../matrix_explore"))
    nb = read_json(path)
    assert doc.read_text() == render("baseline/analysis.md", page) and sorted(p.stem for p in (copy / "figures").glob("*.png")) == sorted(b.name for b in figures_of(page))
    assert shown_by(nb) == [md_block(b) for s in page.values() for b in s.blocks if b.kind != "figure"]
    assert sum("image/png" in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])) == len(figures_of(page))
    added = ["".join(c["source"]) for c in nb["cells"] if INJECTED in c["metadata"].get("tags", [])]
    assert len(added) == 1 and '"../elsewhere"' in added[0] and "matrix_explore" not in added[0] # Only what differs from its own
    assert clean(nb) == nb and str(copy) not in path.read_text()
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    run_notebook(path, dict(confirm="../elsewhere"))
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before

def test_a_notebook_that_fails_says_why(tmp_path):
    nb = dict(cells=[dict(cell_type="code", id="a", source="raise KeyError('no such arm')", execution_count=None, metadata={}, outputs=[])], metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")), nbformat=4, nbformat_minor=5)
    (tmp_path / "x.ipynb").write_text(json.dumps(nb))
    with pytest.raises(ValueError, match=r"x.ipynb failed: .*KeyError: 'no such arm'"): run_notebook(tmp_path / "x.ipynb", {})
    assert read_json(tmp_path / "x.ipynb") == nb

def test_without_papermill_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as e: run_notebook(tmp_path / "x.ipynb", {})
    assert explain(e.value) == ["papermill is not installed; pip install 'fg_dapo[notebook]', or make env-dev in a checkout"]

# The command

def ask(*args):
    r = CliRunner().invoke(app, ["results", *args])
    if r.exception and not isinstance(r.exception, SystemExit): raise r.exception
    return r.exit_code, r.output

def test_the_command_checks_and_changes_nothing(copy, monkeypatch):
    (copy / "experiments").mkdir()
    for p in [p for p in copy.iterdir() if p.name != "experiments"]: p.rename(copy / "experiments" / p.name)
    monkeypatch.chdir(copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    (copy / "experiments/RESULTS.md").write_text("# Results\n")
    code, said = ask("--check")
    assert code == 1 and "experiments/RESULTS.md: not what the result files give" in said and "fg-dapo results" in said and "paper_outline" not in said
    assert {p: b for p, b in before.items() if p.read_bytes() != b}.keys() == {copy / "experiments/RESULTS.md"}

def test_the_command_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = ask()
    assert code == 1 and "experiments/protocol.yaml" in said and "checkout" in said

def test_the_command_runs_every_notebook_once(made, tmp_path, monkeypatch):
    for name in (*NOTEBOOKS, "protocol.yaml"):
        (tmp_path / "experiments" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / name, tmp_path / "experiments" / name)
    monkeypatch.chdir(tmp_path)
    ran, root = [], Path("experiments")
    (root / "figures").mkdir()
    (root / "figures/old.png").write_bytes(b"")
    def play(path, parameters): # What the notebook would do, without a kernel
        ran.append((str(path.relative_to(root)), parameters["confirm"]))
        e, name = committed(root), str(path.relative_to(root))
        mine = [p for p, d in DOCUMENTS.items() if d.notebook == name]
        nb = read_json(path)
        nb["cells"] = [dict(cell_type="code", id="a", source="", execution_count=None, metadata={}, outputs=[dict(output_type="display_data", metadata={}, data={"text/markdown": md_block(b)}) for p in mine for s in page_of(p, e).values() for b in s.blocks if b.kind != "figure"])]
        path.write_text(json.dumps(nb))
        for p in mine: write_document(p, page_of(p, e), root)
    monkeypatch.setattr(documents, "run_notebook", play)
    code, said = ask()
    assert code == 0 and sorted(n for n, _ in ran) == NOTEBOOKS and dict(ran)["results.ipynb"] == "matrix_confirm" and dict(ran)["baseline/baseline.ipynb"] == "../matrix_confirm"
    assert "removed experiments/figures/old.png" in said and "0 confirm, 0 explore" in said and not (root / "figures/old.png").exists()
    assert ask("--check")[0] == 0
