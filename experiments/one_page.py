"""Feedback-guided DAPO on one page, over the seam and with a policy of 150,000 parameters. Read it from top to bottom.

A task is attempted by a group of rollouts. They run in waves: the first is cold, later ones read in their prompt what
the failures before them got wrong. The policy is trained by DAPO on the prompts that were really read, and by replay on
successes under the PLAIN prompt. What counts is the success of the plain prompt: that feedback is not needed any more.

    python experiments/one_page.py            # the toy, about a minute on a CPU
    python experiments/one_page.py my_module:MyEnv rows.jsonl
"""
import random, sys
from collections import deque
from dataclasses import dataclass

import torch

from fg_dapo.chat.compact import CompactTools, WrittenEpisode, compact_tokenizer, episode_ids
from fg_dapo.env.registry import environment as find_environment
from fg_dapo.policy import new_policy
from fg_dapo.rollout.local import warm_demonstration

@dataclass
class Settings:
    seed: int = 0
    steps: int = 40          # of training
    tasks: int = 8           # groups of a step
    waves: tuple = (2, 2, 4) # rollouts of a group, wave by wave; the first reads no feedback
    detail: str = "observed" # what feedback tells: only what the failed attempt showed
    guided: bool = True      # False: plain DAPO
    clip_low: float = 0.2
    clip_high: float = 0.28
    lr: float = 1e-3
    buffer: int = 256        # successes that are kept for replay
    replay_rows: int = 32    # successes in a replay batch
    replay_updates: int = 4  # replay batches of a step
    warm_steps: int = 400    # of the warm start, which shows how to write calls and to read feedback
    max_new: int = 16        # tokens of a turn
    eval_every: int = 5

# 1. Sampling. A rollout is one dialogue: token ids, which of them the policy wrote, and their log-probabilities.
@dataclass
class Rollout:
    task: object
    episode: object
    feedback: str            # what the prompt told of earlier attempts
    ids: list
    mask: list               # 1 on the policy's tokens
    logp: list               # when they were sampled, 0 elsewhere
    turns: list              # what the policy wrote and what came back, as text
    @property
    def success(self): return self.episode.outcome().success

def pad(rows, fill=0):
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

@torch.no_grad()
def sample_turns(model, rollouts, stop, limit):
    "Every rollout writes one turn: tokens up to the stop token."
    live = list(rollouts)
    ends = {id(r): len(r.ids) + limit for r in rollouts}
    while live:
        last = torch.tensor([len(r.ids) - 1 for r in live])
        logits = model(pad([r.ids for r in live])).logits[torch.arange(len(live)), last].float()
        tokens = torch.multinomial(logits.softmax(-1), 1)
        logps = logits.log_softmax(-1).gather(1, tokens)
        for rollout, token, logp in zip(live, tokens[:, 0].tolist(), logps[:, 0].tolist()):
            rollout.ids.append(token)
            rollout.mask.append(1)
            rollout.logp.append(logp)
        live = [r for r in live if r.ids[-1] != stop and len(r.ids) < ends[id(r)]]

def play(model, tok, chat, environment, asked, s):
    "Play `asked`, pairs of a task and feedback, all at once, to the end."
    rollouts = []
    for task, feedback in asked:
        ids = tok(chat.prompt(task.prompt, feedback), add_special_tokens=False)["input_ids"]
        episode, mask, logp = environment.open(task, s.seed), [0] * len(ids), [0.0] * len(ids)
        rollouts.append(Rollout(task, episode, feedback, ids, mask, logp, []))
    live = rollouts
    while live:
        starts = [len(r.ids) for r in live]
        sample_turns(model, live, tok.eos_token_id, s.max_new)
        for rollout, start in zip(live, starts):
            text = tok.decode(rollout.ids[start:])
            if not text.endswith(chat.stop): rollout.episode.stop() # It ran out of tokens
            else: replies = rollout.episode.act(chat.parse(text))
            heard = "" if rollout.episode.done else chat.replies(replies)
            given = tok(heard, add_special_tokens=False)["input_ids"]
            rollout.turns.append((text, heard))
            rollout.ids += given
            rollout.mask += [0] * len(given)
            rollout.logp += [0.0] * len(given)
        live = [r for r in live if not r.episode.done]
    return rollouts

# 2. Groups in waves. A failure's feedback is read by the later waves of its own group.
def sample_groups(model, tok, chat, environment, tasks, s):
    groups, told = [[] for _ in tasks], [{} for _ in tasks]
    for size in s.waves:
        asked = [(task, "\n".join(told[i])) for i, task in enumerate(tasks) for _ in range(size)]
        for n, rollout in enumerate(play(model, tok, chat, environment, asked, s)):
            groups[n // size].append(rollout)
        for i, group in enumerate(groups):
            for rollout in group[-size:]:
                if not s.guided or rollout.success: continue
                text = environment.feedback(rollout.episode, s.detail)
                told[i].pop(text, None)
                told[i][text] = True # A dict keeps the order and drops what was said before
            told[i] = dict.fromkeys(list(told[i])[-3:])
    return groups

# 3. The objective: DAPO on rows as they were sampled, and replay under the plain prompt.
def advantages(rewards):
    "Of one group: reward less the mean, in standard deviations; `None` when all are equal, and the group is dropped."
    if len(set(rewards)) == 1: return None
    rewards = torch.tensor(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)

def dapo_loss(logp, old_logp, adv, mask, s):
    "Clip-higher policy loss, as a mean over all tokens of the batch."
    ratio = ((logp - old_logp) * mask).exp()
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    loss = torch.maximum(-adv[:, None] * ratio, -adv[:, None] * clipped)
    return (loss * mask).sum() / mask.sum()

def replay_loss(logp, mask): return -(logp * mask).sum() / mask.sum()

def token_logp(model, ids):
    "Log-probability of every token but the first."
    logits = model(ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

# 4. Training.
def train_step(model, tok, chat, environment, optimizer, buffer, tasks, rng, s):
    groups, rows, advs = sample_groups(model, tok, chat, environment, tasks, s), [], []
    for group in groups:
        adv = advantages([r.episode.outcome().score for r in group])
        if adv is not None: rows, advs = rows + group, advs + [adv]
        for rollout in group:
            if rollout.success: buffer.append((rollout.task, tuple(rollout.turns)))
    if rows:
        ids, mask = pad([r.ids for r in rows]), pad([r.mask for r in rows])[:, 1:]
        old = pad([r.logp for r in rows], 0.0)[:, 1:]
        step(model, optimizer, dapo_loss(token_logp(model, ids), old, torch.cat(advs), mask, s))
    for _ in range(s.replay_updates if s.guided and buffer else 0):
        batch = rng.sample(list(buffer), min(s.replay_rows, len(buffer)))
        ids, mask = as_batch(tok, [(chat.prompt(task.prompt), turns) for task, turns in batch])
        step(model, optimizer, replay_loss(token_logp(model, ids), mask))
    return groups

def as_batch(tok, texts):
    "Prompts and turns as ids, and the policy's tokens among them (of all but the first)."
    pairs = [episode_ids(tok, WrittenEpisode(prompt, turns)) for prompt, turns in texts]
    return pad([ids for ids, _ in pairs]), pad([mask for _, mask in pairs])[:, 1:]

def warm_start(environment, s):
    "A policy that writes calls and reads feedback, and knows nothing of the hidden rules."
    rng, chat = random.Random(s.seed), CompactTools(environment.open(environment.tasks("train")[0], 0).tools())
    tok = compact_tokenizer((str(warm_demonstration(environment, chat, rng)) for _ in range(1000)), 512)
    model = new_policy(tok, s.seed, width=64, layers=2, heads=4, inner=192, max_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for i in range(s.warm_steps):
        for g in optimizer.param_groups: g["lr"] = 3e-3 * min(1, (i + 1) / 50) * (1 - i / s.warm_steps)
        shown = [warm_demonstration(environment, chat, rng) for _ in range(32)]
        ids, mask = as_batch(tok, [(w.prompt, w.turns) for w in shown])
        step(model, optimizer, replay_loss(token_logp(model, ids), mask))
    return model, tok, chat

def cold_success(model, tok, chat, environment, s, split="test", n=64):
    "Share of tasks solved from the plain prompt."
    rollouts = play(model, tok, chat, environment, [(task, "") for task in environment.tasks(split)[:n]], s)
    return sum(r.success for r in rollouts) / len(rollouts)

def train(environment, s, start=None, say=print):
    "Train a policy; gives it and rows of step, rollouts, cold success and the success of guided rollouts."
    torch.manual_seed(s.seed)
    model, tok, chat = start or warm_start(environment, s)
    optimizer, buffer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0), deque(maxlen=s.buffer)
    rng, train_tasks, curve, last = random.Random(s.seed), environment.tasks("train"), [], 0.0
    for i in range(s.steps + 1):
        if i % s.eval_every == 0:
            cold = cold_success(model, tok, chat, environment, s)
            curve.append(dict(step=i, rollouts=i * s.tasks * sum(s.waves), cold=cold, last_wave=last))
            say(" ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in curve[-1].items()))
        if i == s.steps: break
        tasks = rng.sample(list(train_tasks), min(s.tasks, len(train_tasks)))
        groups = train_step(model, tok, chat, environment, optimizer, buffer, tasks, rng, s)
        last = sum(r.success for g in groups for r in g[-s.waves[-1]:]) / (len(groups) * s.waves[-1])
    return model, curve

if __name__ == "__main__":
    name, rows = (*sys.argv[1:], None, None)[:2]
    train(find_environment(name or "toy", **({"rows": rows} if rows else {})), Settings())
