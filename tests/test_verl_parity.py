"""Our objective against verl's own functions, in float64. There is no skip: `make test` installs verl, and without it these tests fail."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage, compute_policy_loss_vanilla
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
from verl.workers.config import ActorConfig
from verl.workers.reward_manager.dapo import DAPORewardManager

from fg_dapo.method.objective import dapo_loss, group_advantages, overlong_penalty, replay_loss, token_entropy, token_logp, token_mean

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
