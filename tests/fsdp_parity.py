"""The local engine's loss beside verl's FSDP engine, in one process; prints one JSON line a case. Run by test_verl_engine.py.

It needs verl with the platform for a CPU, which is chosen before verl is imported, so it is a process of its own."""
import json, os, sys
from functools import partial

policy, data = sys.argv[1:3]
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])

import torch
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import ppo_loss, sft_loss

from fg_dapo.agent.chat import chat_format
from fg_dapo.config import load_config
from fg_dapo.core import rng_for
from fg_dapo.engines.local import Replayer, collect, forward_logp, make_sampler, row_loss, to_entry, training_rows
from fg_dapo.engines.verl import replay_batch
from fg_dapo.engines.verl_config import compose, overrides
from fg_dapo.method.objective import replay_loss
from fg_dapo.policy import encode, load_policy
from fg_dapo.world.records import load_world

torch.set_num_threads(1)

def config(**more):
    return load_config(None, ["engine=verl", f"policy.checkpoint={policy}", f"data.folder={data}", "train.tasks_per_step=4", "train.rollouts=4", "algorithm.updates=1", "algorithm.feedback_guidance.detail=full",
        "hardware.gpus_per_node=1", "hardware.gradient_checkpointing=false", "limits.max_new_tokens=48", *(f"{k}={v}" for k, v in more.items())])

def ragged(xs, dtype=None): return torch.nested.as_nested_tensor([torch.tensor(x, dtype=dtype) for x in xs], layout=torch.jagged)

def engine(c):
    "verl's training worker with its FSDP2 engine, as the actor process builds it."
    v = compose(overrides(c, "unused")).actor_rollout_ref
    actor, model = omega_conf_to_dataclass(v.actor), omega_conf_to_dataclass(v.model)
    actor.model_config = model
    e = actor.engine
    e.use_dynamic_bsz, e.max_token_len_per_gpu, e.infer_max_token_len_per_gpu = True, v.actor.ppo_max_token_len_per_gpu, v.actor.ppo_max_token_len_per_gpu
    worker = TrainingWorker(TrainingWorkerConfig(model_type="language_model", model_config=model, engine_config=e, optimizer_config=actor.optim, checkpoint_config=actor.checkpoint))
    worker.reset()
    return worker, actor

def verl_batch(rows, samples_weight):
    "Rows as the TransferQueue has them."
    at = [r.mask.index(1) if 1 in r.mask else len(r.ids) - 1 for r in rows]
    cut = lambda xs: [x[a:] for x, a in zip(xs, at)]
    fields = dict(input_ids=ragged([r.ids for r in rows]), position_ids=ragged([list(range(len(r.ids))) for r in rows]), prompts=ragged([r.ids[:a] for r, a in zip(rows, at)]),
        responses=ragged(cut([r.ids for r in rows])), response_mask=ragged(cut([r.mask for r in rows])), loss_mask=ragged(cut([r.mask for r in rows])),
        old_log_probs=ragged(cut([r.logp for r in rows]), torch.float32), advantages=ragged([[r.adv * m for m in r.mask[a:]] for r, a in zip(rows, at)], torch.float32))
    if samples_weight is not None: fields["rollout_is_weights"] = ragged(cut(samples_weight), torch.float32)
    return tu.get_tensordict(fields, dict(temperature=1.0, global_batch_size=len(rows), calculate_entropy=False))

def weights_of_verl(rows, sampled, cap):
    "verl's truncated importance weights for rows whose old and sampled log-probabilities are given."
    n = max(len(r.ids) for r in rows)
    pad = lambda xs: torch.tensor([x + [0.0] * (n - len(x)) for x in xs])
    c = compose({"algorithm.rollout_correction.rollout_is": "token", "algorithm.rollout_correction.rollout_is_threshold": cap}).algorithm.rollout_correction
    batch = TensorDict(dict(old_log_probs=pad([r.logp for r in rows]), rollout_log_probs=pad(sampled), response_mask=pad([r.mask for r in rows])), batch_size=len(rows))
    out, _ = compute_rollout_correction_and_add_to_batch(DataProto(batch=batch), c)
    return [w[:len(r.ids)].tolist() for r, w in zip(rows, out.batch["rollout_is_weights"])]

def main():
    world = load_world(data)
    model, tok = load_policy(policy)
    base = config()
    samples = collect(make_sampler(model, tok, world, base, 1.0), world.scenarios("train")[:4], base, 0)
    for i, s in enumerate(samples): s.result.update(acc=float((s.group + s.position * 3) % 4 == 0), score=((s.group * 7 + s.position * 5) % 11) / 10) # Rewards that mix in every group
    worker, actor = engine(base)
    with torch.no_grad(): # Old log-probabilities of another policy, so that ratios are not all 1
        for s in samples: s.rollout.logp = [x - 0.3 * m * ((i % 5) - 2) for i, (x, m) in enumerate(zip(s.rollout.logp, s.rollout.mask))]
    # One update changes the weights, so the loss is asked for without one
    for baseline in ("group", "condition", "cold"):
        for filter_on in ("group", "cold"):
            for mode in ("none", "strip"):
                c = config(**{"algorithm.baseline": baseline, "algorithm.filter_on": filter_on, "algorithm.transfer.mode": mode})
                rows = training_rows(samples, c, model, tok)
                with torch.no_grad(): local, _ = row_loss(model, rows, c, tok.pad_token_id, sum(r.tokens for r in rows))
                weight, off = None, 0.0
                if mode == "strip":
                    sampled = {(s.group, tuple(i for i, m in zip(s.rollout.ids, s.rollout.mask) if m)): [x for x, m in zip(s.rollout.logp, s.rollout.mask) if m] for s in samples}
                    def as_sampled(r):
                        it = iter(sampled[r.group, tuple(i for i, m in zip(r.ids, r.mask) if m)])
                        return [next(it) if m else 0.0 for m in r.mask]
                    weight = weights_of_verl(rows, [as_sampled(r) for r in rows], c.algorithm.transfer.weight_cap)
                    off = max(abs(w - x) for r, ws in zip(rows, weight) if r.weight for w, x, m in zip(ws, r.weight, r.mask) if m)
                worker.set_loss_fn(partial(ppo_loss, config=actor))
                out = worker.infer_batch(verl_batch(rows, weight))
                print(json.dumps(dict(case=[baseline, filter_on, mode], local=float(local), verl=float(tu.get(out, "metrics")["loss"]), rows=len(rows), weight=off)), flush=True)
    for s in samples: s.result["acc"] = 1.0
    for reexecute in (False, True):
        c = config(**{"algorithm.transfer.reexecute": str(reexecute).lower()})
        replayer = Replayer({s.task.id: s for s in world.scenarios("train")}, c, chat_format("compact"), {x.name for x in world.companies.values()})
        from fg_dapo.agent.scripted import best_plan
        from fg_dapo.method.replay import plan_entry
        for s in samples:
            entry = plan_entry(s.rollout.job.scenario.task.id, best_plan(s.rollout.job.scenario), (), s.rollout.job.feedback) if reexecute else to_entry(s, False)
            replayer.buffer.add(entry)
        rows = [encode(tok, t) for t in replayer.rows(rng_for(0, "parity"), 8)]
        at = 2.0 if reexecute else 1.0
        with torch.no_grad(): local = replay_loss(*forward_logp(model, [i for i, _ in rows], [m for _, m in rows], tok.pad_token_id, temperature=at)[:2])
        worker.set_loss_fn(partial(sft_loss, config=None))
        batch = replay_batch(rows, 1e-3, at)
        tu.pop(batch, "replay_lr")
        out = worker.infer_batch(batch)
        print(json.dumps(dict(case=["replay", "reexecute" if reexecute else "as sampled", f"temperature {at:g}"], local=float(local), verl=float(tu.get(out, "metrics")["loss"]), rows=len(rows), weight=0.0)), flush=True)

if __name__ == "__main__": main()
