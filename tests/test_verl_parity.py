"""Our objective against verl's own functions, in float64, and the local engine against verl's losses on real rollouts. There is no skip: `make test` installs verl, and without it these tests fail."""
import copy, statistics
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage, compute_policy_loss_vanilla
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import tensordict_utils
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
from verl.workers.config import ActorConfig
from verl.workers.reward_manager.dapo import DAPORewardManager
from verl.workers.utils.losses import ppo_loss, sft_loss

from fg_dapo.agent.scripted import best_plan
from fg_dapo.config import load_config
from fg_dapo.core import rng_for
from fg_dapo.engines.local import Trainer, collect, judge, replay_updates, row_loss, training_rows
from fg_dapo.method.objective import dapo_loss, group_advantages, importance_weights, overlong_penalty, replay_loss, token_entropy, token_logp, token_mean
from fg_dapo.method.replay import plan_entry
from fg_dapo.policy import encode

SEEDS = range(6)
TOL = 1e-6

def gen(seed): return torch.Generator().manual_seed(seed)

def ragged_mask(g, rows, tokens):
    "Responses of different lengths with holes (tool answers); one row is empty, every other has its first token."
    length = torch.randint(1, tokens + 1, (rows,), generator=g)
    mask = (torch.arange(tokens) < length[:, None]) & (torch.rand(rows, tokens, generator=g) < .7)
    mask[:, 0] = True
    mask[rows // 2] = False
    return mask

def close(ours, theirs, tol=TOL):
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all() and (ours - theirs).abs().max().item() < tol, (ours - theirs).abs().max()

@pytest.mark.parametrize("scale_std", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages(seed, scale_std):
    g, rows, tokens = gen(seed), 64, 5
    group = torch.randint(0, 14, (rows,), generator=g) * 37 - 100 # Not dense, not sorted, of unequal size
    group[7], group[8] = 10_000, 20_000 # Groups of one
    reward = torch.rand(rows, generator=g, dtype=torch.float64).round(decimals=1)
    reward[group == group[0]] = .3 # A group without deviation
    mask = ragged_mask(g, rows, tokens)
    token_rewards = torch.zeros(rows, tokens, dtype=torch.float64)
    token_rewards[:, -1] = reward
    theirs, _ = compute_grpo_outcome_advantage(token_rewards, mask.double(), group.numpy(), norm_adv_by_std_in_grpo=scale_std)
    ours = group_advantages(reward, group, baseline="group", scale_std=scale_std)
    assert ours.abs().max() > .3 and (group == group[0]).sum() > 1
    close(ours[:, None] * mask, theirs)

def batch(seed, spread):
    g, rows, tokens = gen(seed), 12, 9
    old = -3 * torch.rand(rows, tokens, generator=g, dtype=torch.float64)
    logp = old + spread * torch.randn(rows, tokens, generator=g, dtype=torch.float64)
    return logp, old, torch.randn(rows, generator=g, dtype=torch.float64), ragged_mask(g, rows, tokens)

@pytest.mark.parametrize("clip_low,clip_high,clip_c", [(.2, .28, 10.), (.2, .2, 3.), (.1, .5, 1.5)])
@pytest.mark.parametrize("spread", [.02, .5, 4., 40.]) # At 40 the log-ratios reach far beyond the clamp at 20
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient(seed, spread, clip_low, clip_high, clip_c):
    logp, old, adv, mask = batch(seed, spread)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=clip_low, clip_ratio_high=clip_high, clip_ratio_c=clip_c)
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    ours, stats = dapo_loss(a, old, adv, mask, clip_low, clip_high, clip_c)
    theirs, metrics = compute_policy_loss_vanilla(old, b, adv[:, None].expand_as(old), mask.double(), "token-mean", config)
    scale = max(1., theirs.abs().item()) # Unclipped ratios reach e^20: there the difference is relative
    close(ours / scale, theirs / scale)
    ours.backward(); theirs.backward()
    close(a.grad / scale, b.grad / scale)
    close(stats["clip_frac"], metrics["actor/pg_clipfrac"])
    close(stats["approx_kl"], metrics["actor/ppo_kl"])

@pytest.mark.parametrize("cap", [2., .5, 1e6])
@pytest.mark.parametrize("spread", [.5, 40.])
@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights_and_the_weighted_loss(seed, spread, cap):
    logp, old, adv, mask = batch(seed, .5)
    sampled = old + spread * torch.randn(old.shape, generator=gen(seed + 100), dtype=torch.float64)
    theirs, _ = compute_rollout_correction_weights(old - sampled, mask.double(), "token", cap)
    weight = importance_weights(old, sampled, cap)
    scale = max(1., cap)
    close(weight * mask / scale, theirs / scale)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=.2, clip_ratio_high=.28, clip_ratio_c=10.)
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    ours, _ = dapo_loss(a, old, adv, mask, weight=weight)
    theirs, _ = compute_policy_loss_vanilla(old, b, adv[:, None].expand_as(old), mask.double(), "token-mean", config, theirs)
    close(ours / scale, theirs / scale)
    ours.backward(); theirs.backward()
    close(a.grad / scale, b.grad / scale)

def test_the_cases_reach_every_branch():
    "Both clips, the dual clip and the clamp are met by the batches above."
    logp, old, adv, mask = batch(0, 40.)
    log_ratio, adv = (logp - old)[mask], adv[:, None].expand_as(old)[mask]
    assert ((log_ratio > 20) & (adv < 0)).any() and (log_ratio < -20).any()
    assert ((log_ratio.exp() > 1.28) & (adv > 0)).any() and ((log_ratio.exp() < .8) & (adv < 0)).any()

@pytest.mark.parametrize("seed", SEEDS)
def test_token_mean_and_its_pieces(seed):
    logp, old, adv, mask = batch(seed, .5)
    close(token_mean(logp, mask), agg_loss(logp, mask.double(), "token-mean"))
    close(replay_loss(logp, mask), agg_loss(-logp, mask.double(), "token-mean"))
    tokens = int(mask.sum())
    pieces = zip(*(x.split([5, 4, 3]) for x in (logp, old, adv, mask)))
    for piece in pieces: close(token_mean(piece[0], piece[3], tokens), agg_loss(piece[0], piece[3].double(), "token-mean", batch_num_tokens=tokens))

@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [1., .6])
def test_logp_and_entropy(seed, temperature):
    g = gen(seed)
    logits, ids = 10 * torch.randn(4, 7, 33, generator=g, dtype=torch.float64), torch.randint(0, 33, (4, 7), generator=g)
    close(token_logp(logits, ids, temperature), logprobs_from_logits(logits / temperature, ids))
    close(token_entropy(logits, temperature), entropy_from_logits(logits / temperature))

@pytest.mark.parametrize("factor", [1., .5])
@pytest.mark.parametrize("max_length,buffer", [(24, 8), (10, 10), (16, 1)])
def test_overlong_penalty(max_length, buffer, factor):
    length = torch.arange(1, max_length + 1)
    mask = torch.arange(max_length) < length[:, None]
    rows, prompt = len(length), torch.ones(len(length), 1, dtype=torch.long)
    data = DataProto.from_dict(
        tensors=dict(prompts=prompt, responses=torch.ones(rows, max_length, dtype=torch.long), attention_mask=torch.cat([prompt, mask.long()], 1)),
        non_tensors=dict(reward_model=np.array([dict(ground_truth="")] * rows), data_source=np.array(["calls"] * rows), extra_info=np.array([{} for _ in range(rows)])))
    manager = DAPORewardManager(SimpleNamespace(decode=lambda ids, **_: "x", eos_token="</s>"), 0, compute_score=lambda **_: 0., max_resp_len=max_length,
                                overlong_buffer_cfg=SimpleNamespace(enable=True, len=buffer, penalty_factor=factor, log=False))
    ours = overlong_penalty(length, max_length, buffer, factor)
    assert ours.min() == -factor
    close(ours, manager(data).sum(-1))

# --- the local engine, on real rollouts ---

@pytest.fixture(scope="module")
def step(raw_policy, world, tmp_path_factory):
    """A step of the raw policy, guided at detail `full`, with successes by hand, and a policy that has moved on since.
    Cold are positions 0 and 1. Group 0: cold and guided rows differ; 1: only guided rows; 2: none do; 3: only cold rows, guided all fail; 4: cold agree on success."""
    from conftest import ROOT
    sets = [f"policy.checkpoint={raw_policy}", f"data.folder={ROOT / 'data'}", "train.tasks_per_step=5", "train.rollouts=8", "train.threads=1", "limits.max_new_tokens=16",
            "limits.tool_calls=3", "algorithm.feedback_guidance.detail=full", "algorithm.transfer.updates=1", "algorithm.transfer.rows=8", "algorithm.transfer.weight_cap=1.05"]
    t = Trainer(load_config(None, sets), tmp_path_factory.mktemp("parity") / "r")
    samples = collect(t.sampler, t.scenarios[:5], t.config, 0)
    wins = {0: (1, 2, 5), 1: (4, 6), 2: (), 3: (0,), 4: (0, 1, 3)}
    for s in samples: s.result["acc"] = float(s.position in wins[s.group])
    moved, g = copy.deepcopy(t.model), gen(0)
    with torch.no_grad():
        for p in moved.parameters(): p += .1 * p.std() * torch.randn(p.shape, generator=g)
    return SimpleNamespace(trainer=t, samples=samples, moved=moved, sets=sets)

KEPT = dict(group={0, 1, 3, 4}, cold={0, 3})

def logprobs(model, ids):
    "By verl's function: at each token the log-probability of the next; the last has none."
    ids = torch.tensor([ids])
    return torch.cat([logprobs_from_logits(model(input_ids=ids[:, :-1]).logits, ids[:, 1:])[0], torch.zeros(1)])

def jagged(rows, dtype=None): return torch.nested.as_nested_tensor([torch.as_tensor(r, dtype=dtype) for r in rows], layout=torch.jagged)

def verl_advantages(samples, baseline):
    "By verl's estimator with its groups cut as the baseline says; verl has none for `cold`, so that is written out row by row."
    reward = [s.result["acc"] for s in samples]
    if baseline != "cold":
        index = np.array([s.group if baseline == "group" else f"{s.group} {s.guided}" for s in samples])
        return compute_grpo_outcome_advantage(torch.tensor(reward)[:, None], torch.ones(len(reward), 1), index)[0][:, 0].tolist()
    cold = {g: [s.result["acc"] for s in samples if s.group == g and not s.guided] for g in {s.group for s in samples}}
    return [(r - statistics.mean(cold[s.group])) / ((statistics.stdev(cold[s.group]) or 1) + 1e-6) for r, s in zip(reward, samples)]

def verl_rows(step, baseline, kept, transfer, cap):
    "What verl's trainer would be given: prompt, response, its mask, old log-probabilities and weights, built from the rollouts themselves."
    t, out = step.trainer, []
    for s, adv in zip(step.samples, verl_advantages(step.samples, baseline)):
        if s.group not in kept: continue
        r, begin = s.rollout, s.rollout.mask.index(1)
        mask, sampled = torch.tensor(r.mask[begin:]), torch.tensor(r.logp[begin:])
        out.append(dict(prompts=r.ids[:begin], responses=r.ids[begin:], response_mask=mask, old_log_probs=sampled, advantages=adv * mask, rollout_is_weights=mask.float()))
        if transfer == "strip" and s.guided:
            prompt = t.sampler.encode(t.sampler.chat.prompt(r.job.scenario.task.request))
            with torch.no_grad(): old = logprobs(t.model, prompt + r.ids[begin:])[len(prompt) - 1:-1] * mask
            weight, _ = compute_rollout_correction_weights((old - sampled)[None], mask[None], "token", cap)
            out.append(dict(prompts=prompt, responses=r.ids[begin:], response_mask=mask, old_log_probs=old, advantages=adv * mask, rollout_is_weights=weight[0]))
    return out

def gradients(model): return torch.cat([p.grad.flatten() for p in model.parameters()])

@pytest.mark.parametrize("transfer", ["none", "replay", "strip"])
@pytest.mark.parametrize("filter_on", ["group", "cold"])
@pytest.mark.parametrize("baseline", ["group", "condition", "cold"])
def test_the_local_engines_policy_gradient(step, baseline, filter_on, transfer):
    c = load_config(None, [*step.sets, f"algorithm.baseline={baseline}", f"algorithm.filter_on={filter_on}", f"algorithm.transfer.mode={transfer}"])
    t, a = step.trainer, c.algorithm
    adv, keep, _ = judge(step.samples, c)
    close(adv, verl_advantages(step.samples, baseline), 1e-5)
    assert {s.group for s, k in zip(step.samples, keep) if k} == KEPT[filter_on]
    rows = verl_rows(step, baseline, KEPT[filter_on], transfer, a.transfer.weight_cap)
    tokens = sum(int(r["response_mask"].sum()) for r in rows)
    data = TensorDict({k: jagged([r[k] for r in rows]) for k in rows[0]}, batch_size=[len(rows)])
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(rows))
    config = ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="token-mean", clip_ratio_low=a.clip_low, clip_ratio_high=a.clip_high, clip_ratio_c=a.clip_c)
    model = step.moved
    model.zero_grad()
    theirs, metrics = ppo_loss(config, dict(log_probs=jagged([logprobs(model, r["prompts"] + r["responses"]) for r in rows])), data)
    theirs.backward()
    their_gradient = gradients(model)

    model.zero_grad()
    mine = training_rows(step.samples, c, t.model, t.tok)
    assert sum(r.tokens for r in mine) == tokens and len(mine) == len(rows) == 8 * len(KEPT[filter_on]) * (7 if transfer == "strip" else 4) // 4
    ours = [row_loss(model, mine[i:i + 9], c, t.tok.pad_token_id, tokens) for i in range(0, len(mine), 9)]
    sum(loss for loss, _ in ours).backward()
    close(sum(loss for loss, _ in ours).detach(), theirs.detach(), 1e-5)
    close(gradients(model), their_gradient, 1e-5)
    logged = sum((Counter(log) for _, log in ours), Counter())
    close(logged["clip_frac"] / tokens, metrics["actor/pg_clipfrac"].aggregate(), 1e-5)
    assert logged["clip_frac"] > 0 and their_gradient.abs().max() > 1e-3 and abs(theirs.item()) > 1e-4 # The policy has moved: it is not all zeros that agree

def test_the_local_engines_replay(step):
    t = step.trainer
    for s in t.scenarios[:6]: t.replayer.buffer.add(plan_entry(s.task.id, best_plan(s)))
    rows = [encode(t.tok, x) for x in t.replayer.rows(rng_for(3, "replay", 0), 8)]
    tokens, model = sum(sum(m) for _, m in rows), copy.deepcopy(t.model)
    data = TensorDict(dict(loss_mask=jagged([m for _, m in rows])), batch_size=[len(rows)])
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens)
    theirs, _ = sft_loss(None, dict(log_probs=jagged([logprobs(model, ids) for ids, _ in rows])), data)
    theirs.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    ours = copy.deepcopy(t.model)
    log = replay_updates(ours, torch.optim.SGD(ours.parameters(), lr=1e-3), t.replayer, t.tok, 0, t.config.model_copy(update=dict(seed=3)))
    assert len(rows) == 8 and log["updates"] == 1
    close(log["replay_loss"], theirs.detach(), 1e-5)
    close(gradients(ours), gradients(model), 1e-5)
