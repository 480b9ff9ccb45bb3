"""The verl engine for real: Ray, two FSDP ranks, two vLLM servers, on a CPU. A run takes a minute to start, so tests share two."""
import json, os, re, socket, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM's CPU build is for Linux")
pytest.importorskip("verl")

from fg_dapo.method.feedback import RuleBased
from fg_dapo.method.reward import replay_transcript, result_of
from fg_dapo.world.directory import CompanyDirectory
from fg_dapo.agent.chat import chat_format
from fg_dapo.config import load_config
from fg_dapo.core import read_json, read_jsonl
from fg_dapo.engines.sampler import PromptTooLong, shown, text_ids
from fg_dapo.engines.verl_launch import last_step, policy_folder, train
from fg_dapo.method.feedback import Critique, accumulate
from fg_dapo.method.groups import plan_waves
from fg_dapo.method.replay import Entry, entry_plan, told_fields
from fg_dapo.method.reward import compute_score_with_feedback
from fg_dapo.policy import load_policy
from fg_dapo.world.records import as_dict, load_world

ROOT = Path(__file__).parents[1]
SKIP_A_SYNC = """
from verl.checkpoint_engine import CheckpointEngineManager
update = CheckpointEngineManager.update_weights
def skipping(self, global_steps=None, *args, **kwargs):
    if global_steps != 3: return update(self, global_steps, *args, **kwargs)
CheckpointEngineManager.update_weights = skipping
"""

def settings(*more):
    return load_config(ROOT / "experiments/configs/verl_cpu.yaml", [f"policy.checkpoint={ROOT / 'data/tiny'}", f"data.folder={ROOT / 'data'}", "train.sample_groups=99", "train.eval_tasks=6", *more])

def started(config, out, faults=None):
    "A run to its end, with a module of faults imported in each of its processes."
    with pytest.MonkeyPatch.context() as m:
        if faults:
            out.parent.joinpath("faults.py").write_text(faults)
            m.setenv("PYTHONPATH", os.pathsep.join([str(out.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
            m.setenv("VERL_USE_EXTERNAL_MODULES", "fg_dapo.engines.verl_cpu,faults")
        train(config, out, progress=False)
    return out

@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    "Four steps with replay; the weights of step 3 never reach the servers."
    c = settings("train.steps=4", "train.eval_every=4", "train.checkpoint_every=2", "algorithm.transfer.updates=3", "algorithm.transfer.warmup_steps=0", "algorithm.transfer.lacking=0.3", "algorithm.transfer.elsewhere=0.2", "algorithm.feedback_guidance.wave_sizes=[1]")
    return c, started(c, tmp_path_factory.mktemp("verl") / "replay", SKIP_A_SYNC)

@pytest.fixture(scope="module")
def stripped(tmp_path_factory):
    "Two steps with everything that the other run has not."
    c = settings("arm=fg_strip", "train.steps=2", "train.eval_every=0", "algorithm.transfer.mode=strip", "algorithm.baseline=condition", "algorithm.filter_on=cold", "algorithm.refill_batches=2", "algorithm.advantage_from=score",
        "algorithm.feedback_guidance.guided_share=0.5", "algorithm.feedback_guidance.stop_after_successes=1", "train.log=[jsonl,tensorboard,wandb]", "hardware.agent_workers=2", "hardware.gpus_per_node=1")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("WANDB_MODE", "offline")
        return c, started(c, tmp_path_factory.mktemp("verl") / "strip")

def groups_of(out):
    found = {}
    for r in read_jsonl(out / "rollouts.jsonl"): found.setdefault((r["step"], r["group"]), {})[r["position"]] = r
    return found

# Weights

def test_servers_sample_with_the_weights_that_are_trained(replayed):
    diff = [r["rollout_probs_diff_max"] for r in read_jsonl(replayed[1] / "metrics.jsonl")]
    assert len(diff) == 4 and max(diff[:3]) < 1e-4, diff
    assert diff[3] > 1e-2, diff # After the synchronisation that was left out

def test_it_ran_on_two_ranks_and_two_servers(replayed):
    assert sorted(p.name for p in (replayed[1] / "checkpoints/global_step_4/actor").glob("model_*.pt")) == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    assert len(set(re.findall(r"vLLMHttpServer pid=(\d+)", (replayed[1] / "log.txt").read_text()))) == 2

def test_the_exported_policy_is_the_trained_one(replayed, tmp_path):
    import torch
    from typer.testing import CliRunner
    from fg_dapo.cli import app
    a, b = (load_policy(p)[0].state_dict() for p in (ROOT / "data/tiny", policy_folder(replayed[1])))
    assert all(torch.isfinite(x).all() for x in b.values()) and max(float((a[k] - b[k]).abs().max()) for k in a) > 1e-3
    said = CliRunner().invoke(app, ["export", str(replayed[1]), "--out", str(tmp_path / "model")])
    assert said.exit_code == 0, said.output
    c = load_policy(tmp_path / "model")[0].state_dict()
    assert all(torch.equal(b[k], c[k]) for k in b) and not list((tmp_path / "model").glob("*.pt"))

# Feedback

def test_a_guided_rollout_read_the_failures_of_its_own_group(replayed):
    (c, out), tok = replayed, load_policy(ROOT / "data/tiny")[1]
    chat, fb, seen = chat_format("compact"), c.algorithm.feedback_guidance, 0
    waves = plan_waves(4, fb.start_rollout, fb.wave_sizes)
    assert waves == ((0, 1), (2,), (3,))
    for rows in groups_of(out).values():
        assert sorted(rows) == [0, 1, 2, 3]
        for wave, positions in enumerate(waves):
            earlier = [rows[p] for w in waves[:wave] for p in w]
            critiques = tuple(Critique(r["position"] + 1, r["feedback"], r["score"]) for r in earlier if r["acc"] < 1 and r["feedback"])
            text = shown(accumulate(critiques, fb.accumulation_mode, fb.max_feedback_tokens, lambda t: len(text_ids(tok, t))), chat)
            for p in positions:
                r = rows[p]
                request = r["prompt"].split("<|task|> ")[1].split("<|")[0]
                assert r["prompt"] == chat.prompt(request, text) and (r["prompt_feedback"] or "") == text and r["guided"] == bool(text)
                assert r["transcript"].startswith(r["prompt"])
                seen += bool(text)
    assert seen >= 8

def test_a_rollout_is_worth_what_its_transcript_says(replayed, world):
    scenarios = {s.task.id: s for s in world.scenarios("train")}
    directory = CompanyDirectory(world.companies.values())
    rows = read_jsonl(replayed[1] / "rollouts.jsonl")
    assert len(rows) == 64
    for r in rows:
        again = compute_score_with_feedback("fg_dapo", r["transcript"], as_dict(scenarios[r["task_id"]]), dict(detail="full"))
        assert (again["score"], again["acc"], again["partial_scores"]) == (r["score"], r["acc"], r["partial_scores"])
        # A search for a name like several companies' finds none among all, and the task's own where there is no other: feedback needs them all
        full = result_of(replay_transcript(r["transcript"], scenarios[r["task_id"]], "compact", directory), RuleBased("full"), r["transcript"])
        assert (full["feedback"], full["score"]) == (r["feedback"], r["score"])

# Books

def test_the_ledger_counts_every_rollout(replayed):
    c, out = replayed
    metrics, groups = read_jsonl(out / "metrics.jsonl"), groups_of(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and [m["tasks"] for m in metrics] == [4, 8, 12, 16]
    rows = [r for g in groups.values() for r in g.values()]
    last = metrics[-1]["ledger"]
    assert last["rollouts"] == len(rows) == 64 and last["rollouts_guided"] == sum(r["guided"] for r in rows) and last["tokens"] == sum(r["tokens"] for r in rows)
    assert last["rollouts_failed"] == 0 and last["updates"] == sum(m["updates"] for m in metrics) + 4 * c.algorithm.transfer.updates
    for m in metrics:
        step = [r for r in rows if r["step"] == m["step"]]
        assert m["acc_by_position"] == [sum(r["acc"] for r in step if r["position"] == p) / 4 for p in range(4)]
    saved = read_json(out / "checkpoints/global_step_4/fg_dapo.json")
    assert saved["elsewhere"] == dict(tried={}, entries=[]) # 16 of 500 tasks were tried
    assert sum(len(v) for e in saved["buffer"]["entries"] for v in e["payload"].get("tried", {}).values()) <= last["trials"] < last["reexecuted"]
    assert saved["ledger"] == last and saved["tasks"] == 16 and len(saved["buffer"]["entries"]) == metrics[-1]["buffer"]
    assert sorted(p.name for p in (out / "checkpoints").glob("global_step_*")) == ["global_step_2", "global_step_4"] and last_step(out) == 4

def test_plans_were_tried_with_what_other_plans_told(replayed):
    saved, scenarios = read_json(replayed[1] / "checkpoints/global_step_4/fg_dapo.json")["buffer"]["entries"], {s.task.id: s for s in load_world(ROOT / "data").scenarios("train")}
    entries = [Entry(**e) for e in saved]
    told = told_fields(entries, scenarios)
    assert entries
    for e in entries:
        for d, fields in entry_plan(e).calls: assert set(e.payload.get("tried", {}).get(d, ())) == told[scenarios[e.task_id].company.industry, d] - set(fields)

def test_plans_are_tried_elsewhere_when_every_task_was_tried():
    from fg_dapo.engines.verl import FeedbackGuidedDAPOTrainer
    asked, config = [], settings("train.tasks_per_step=4", "algorithm.transfer.elsewhere=0.2")
    replayer = SimpleNamespace(buffer=[1], scenarios=dict.fromkeys(range(10)), widen=asked.append, rows=lambda rng, n: [])
    for step in 1, 2, 3: FeedbackGuidedDAPOTrainer.replay(SimpleNamespace(run=config, global_steps=step, replayer=replayer, beat=lambda _: None, numbers={}), {})
    assert asked == [False, False, True] # 10 tasks, 4 a step

def test_evaluation_and_report_take_a_verl_run_as_any_other(replayed, tmp_path):
    from fg_dapo.evaluation.evaluate import evaluate
    from fg_dapo.evaluation.report import write_report
    evals = read_jsonl(replayed[1] / "evals.jsonl")
    assert [e["step"] for e in evals] == [0, 4] and all(e["n"] == 6 and e["mode"] == "cold" for e in evals)
    rows = evaluate(policy_folder(replayed[1]), ROOT / "data", "val", limit=4)
    assert {r["mode"] for r in rows} == {"cold", "feedback"} and all(r["step"] == 4 and r["rollouts"] == 64 for r in rows)
    assert write_report([replayed[1]], tmp_path / "report").is_file()

def test_a_finished_run_is_not_started_again(replayed):
    before = (replayed[1] / "log.txt").stat().st_size
    assert train(replayed[0], replayed[1], progress=False) == policy_folder(replayed[1])
    assert (replayed[1] / "log.txt").stat().st_size == before
    with pytest.raises(ValueError, match="resume it, or choose another folder"): train(replayed[0], replayed[1], resume=False, progress=False)
    with pytest.raises(ValueError, match="other settings"): train(settings("train.steps=9"), replayed[1], progress=False)

# The other modes

def test_groups_are_mixed_stopped_and_replaced(stripped):
    c, out = stripped
    metrics, groups = read_jsonl(out / "metrics.jsonl"), groups_of(out)
    for m in metrics:
        step = {g: rows for (s, g), rows in groups.items() if s == m["step"]}
        assert sorted(step) == list(range(m["groups"])) and 4 <= m["groups"] <= 12
        assert m["groups"] == 12 or m["groups_kept"] == 4 # Replaced until there are enough, or the limit is reached
        first = [rows for g, rows in step.items() if g < 4]
        assert sum(any(r["guided"] for r in rows.values()) for rows in first) <= 2 # Half of four
        for rows in step.values():
            first_wave = [rows[p]["acc"] for p in (0, 1)]
            assert len(rows) == (2 if max(first_wave) >= 1 else 4)
            values = [rows[p]["score"] for p in rows if not rows[p]["guided"]]
    kept = metrics[-1]["ledger"]["rollouts"] - metrics[-1]["ledger"]["rollouts_filtered"]
    assert 0 <= kept <= metrics[-1]["ledger"]["rollouts"] == sum(map(len, groups.values()))
    assert max(m["rollout_probs_diff_max"] for m in metrics if m["rollout_probs_diff_max"] is not None) < 1e-4

def test_numbers_reach_tensorboard_and_wandb(stripped):
    out = stripped[1]
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    tables = list((out / "wandb").glob("offline-run-*/files/media/table/feedback/*.json"))
    assert bool(tables) == any(r["guided"] for r in read_jsonl(out / "rollouts.jsonl"))
    for t in tables: assert read_json(t)["columns"][3] == "feedback in the prompt" and all(row[3] for row in read_json(t)["data"])
    assert {"fg/acc_by_position/0", "fg/ledger/rollouts", "fg/acc_cold"} <= set(tags)
    assert [e.value for e in events.Scalars("fg/ledger/rollouts")] == [m["ledger"]["rollouts"] for m in read_jsonl(out / "metrics.jsonl")]

# Both engines

def test_verl_s_fsdp_engine_gives_the_local_engine_s_loss():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(VERL_USE_EXTERNAL_MODULES="fg_dapo.engines.verl_cpu", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, str(ROOT / "tests/fsdp_parity.py"), str(ROOT / "data/tiny"), str(ROOT / "data"), str(port)], capture_output=True, text=True, timeout=400, env=env)
    cases = [json.loads(x) for x in run.stdout.splitlines() if x.startswith('{"case"')]
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(cases) == 3 * 2 * 2 + 2 and len({c["local"] for c in cases}) == len(cases)
    for c in cases: assert abs(c["local"] - c["verl"]) < 1e-5 and c["weight"] < 1e-5, c

# What is refused

def test_a_prompt_that_might_not_fit_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(PromptTooLong, match=r"has \d+ tokens, with feedback up to \d+; the limit is 200"): train(settings("limits.max_prompt_tokens=200"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/log.txt").exists()
