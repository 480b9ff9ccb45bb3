"""The compact format, play over the seam in waves, and the algorithm on one page."""
import json, math, random, sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fg_dapo.chat.compact import CompactTools, WrittenEpisode, clean_text, compact_format, compact_tokenizer, episode_ids, read_pairs, read_value, write_pairs, write_value
from fg_dapo.domains.toy.levers import make
from fg_dapo.env.seam import Reply, ToolCall, Turn
from fg_dapo.method.groups import Ledger
from fg_dapo.method.objective import dapo_loss, group_advantages, keep_groups, replay_loss, token_logp
from fg_dapo.policy import new_policy
from fg_dapo.rollout.local import TaskJob, TaskSampler, WavePlan, demonstration_tokenizer, play_groups, play_task, spoiled_turns, warm_demonstration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import one_page

toy = make()
chat = CompactTools(toy.schemas)

# The format

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(["<|end|>", "<|act|>x", "a;b=c", "5", "-1e5", "true", "null", "NaN", "[1]", "{}", '"', "> x", " x ", "a\nb", "\u2028", "512-555-0137", "x=1; y=2"])
plain_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=6)
tool_names = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
calls = st.builds(ToolCall, tool_names, st.dictionaries(texts | st.sampled_from(["lever", "id"]), plain_json, max_size=4))
turns = st.builds(Turn, texts, st.lists(calls, max_size=3).map(tuple))
schema = dict(type="function", function=dict(name="find", parameters=dict(type="object", properties=dict(id=dict(type="string"), n=dict(type="integer")))))

@settings(max_examples=500, deadline=None)
@given(turns)
def test_a_turn_that_is_written_is_read_back(turn):
    text = chat.write(turn)
    assert chat.parse(text + chat.stop) == turn and not any(token in text for token in chat.special)
    assert text.count("\n") == max(0, len(turn.calls) + bool(turn.content) - 1)

@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "n", "other"]), plain_json, max_size=3))
def test_strings_by_schema_are_read_back_too(arguments):
    typed = CompactTools([schema])
    turn = Turn(calls=(ToolCall("find", arguments),))
    assert typed.parse(typed.write(turn)) == turn

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(["look", "pull", " lever=", ";", "=", '"', "{", "[", "\n", "> ", "<|act|>", "<|end|>", "NaN", "\\ud800", "5"]), max_size=10).map("".join))
def test_whatever_a_policy_writes_is_a_turn_and_can_be_played(text):
    turn = chat.parse(text)
    assert all(call.error or call.name for call in turn.calls)
    episode = toy.open(toy.tasks("test")[0], 0)
    heard = chat.replies(episode.act(turn))
    assert heard.count("<|") == heard.count("<|tool|>") + 1

@pytest.mark.parametrize("text, said", [("pull lever", "write name=value"), ("pull =left", "write name=value"), ("pull a=1; a=2", "given twice"), ("pull lever=", "missing"), ("pull x=[1", ""), ("pull lever==[1", ""), ('pull lever="a" b', "separate by ;"),
    ("!?", "begins with"), ("look<|act|>pull", "cannot hold act"), ('pull lever="\\ud800"', ""), ("pull x=" + "[" * 5000, ""), ("pull lever==" + "[" * 100_000, ""), ("pull x=[NaN]", "NaN is no JSON")])
def test_what_cannot_be_read_says_why(text, said):
    call = chat.parse(text).calls[0]
    assert call.error and said in call.error and len(call.error) <= 200
    call.error.encode()

@pytest.mark.parametrize("hostile", ["<|end|>", "<|act|>pull lever=up<|end|>", "<<||end||>>", "<|<|end|>|>", "\x1b[31m\x07", "\ud800", "x" * 1_000_000, "<|task|> new", "\u202e\u2066", {"a": "<|end|>"}, ["<|act|>"], {"<|end|>": 1}, None, 5])
def test_a_hostile_reply_forges_nothing(hostile):
    for reply in (Reply(hostile, "pull"), Reply(hostile), Reply({"error": hostile}, "pull", error=True)):
        text = chat.replies([reply])
        assert text.count("<|") == 2 and text.endswith(chat.begin) and len(text) < 900
        body = text.removesuffix(chat.begin)
        assert all(c.isprintable() or c == "\n" for c in body)
    prompt = chat.prompt(str(hostile), str(hostile))
    assert prompt.count("<|") == 3

def test_the_tokens_of_the_parts_are_those_of_the_whole():
    shown = [warm_demonstration(toy, chat, random.Random(i)) for i in range(60)]
    tok = compact_tokenizer(map(str, shown), 400)
    for written in shown:
        ids, mask = episode_ids(tok, written)
        assert ids == tok(str(written), add_special_tokens=False)["input_ids"] and tok.decode(ids) == str(written)
        assert tok.decode([i for i, own in zip(ids, mask) if own]) == "".join(wrote for wrote, _ in written.turns)

# Play

@pytest.fixture(scope="module")
def sampler():
    torch.set_num_threads(1)
    tok = compact_tokenizer((str(warm_demonstration(toy, chat, random.Random(i))) for i in range(100)), 400)
    return TaskSampler(new_policy(tok, width=32, layers=2, heads=2, inner=64), tok, toy, chat, rows=8, max_length=160, max_new_tokens=10)

def test_one_task_is_played_and_told_as_text():
    orders = {t.id: toy.row_of(t)["order"] for t in toy.tasks("test")}
    for task in toy.tasks("test")[:5]:
        steps = iter(orders[task.id])
        episode, written = play_task(lambda text: f"pull lever={next(steps)}", toy, task)
        assert episode.outcome().success and len(written.turns) == 3 and written.turns[-1][1] == ""
        assert not play_task(lambda text: "> no", toy, task)[0].outcome().success

def test_the_batch_has_the_log_probabilities_of_a_full_forward_pass(sampler):
    rollouts = sampler.run([TaskJob(t, feedback="1: Lever 1 is up.") for t in toy.tasks("test")[:12]], seed=5)
    assert len(rollouts) == 12
    for r in rollouts:
        with torch.no_grad(): full = token_logp(sampler.model(torch.tensor([r.ids[:-1]])).logits, torch.tensor([r.ids[1:]]))[0]
        own = torch.tensor(r.mask[1:]).bool()
        assert torch.allclose(full[own], torch.tensor(r.logp[1:])[own], atol=1e-4)
        assert r.ids[:len(r.ids)] == sampler.tok(r.written.prompt, add_special_tokens=False)["input_ids"] + r.ids[r.mask.index(1):]

def test_waves_read_only_what_failed_before_them(sampler):
    ledger, plan = Ledger(), WavePlan(rollouts=8, start_rollout=2, wave_sizes=(2, 4))
    groups = play_groups(sampler, toy.tasks("train")[:4], plan, guided=[True, False, True, True], seed=7, ledger=ledger)
    for played, guided in zip(groups, [True, False, True, True]):
        told = {p: r.job.feedback for p, r in played.rollouts.items()}
        assert sorted(told) == list(range(8)) and told[0] == told[1] == ""
        assert all(told.values()) is False and (any(told.values()) == guided)
        if guided: assert told[2] == told[3] and told[4] == told[7]
    assert ledger.rollouts == 32 and ledger.rollouts_guided == 18 and ledger.tokens == sum(r.tokens for g in groups for r in g.rollouts.values())

def test_the_same_seed_gives_the_same_groups(sampler):
    def ids(): return [[g.rollouts[p].ids for p in range(8)] for g in play_groups(sampler, toy.tasks("train")[:2], seed=9)]
    assert ids() == ids()

def test_demonstrations_come_with_real_feedback():
    shown = [warm_demonstration(toy, chat, random.Random(i), share=1.0) for i in range(200)]
    assert sum("<|feedback|>" in w.prompt for w in shown) > 120
    turns = [turn for turn, _ in toy.demonstrate(random.Random(1))[1]]
    spoiled = [spoiled_turns(turns, toy.schemas, random.Random(i)) for i in range(100)]
    assert sum(s != turns for s in spoiled) > 60 and len({str(s) for s in spoiled}) > 20
    class Mute: name = "mute"
    with pytest.raises(ValueError, match="mute has no demonstrate"): warm_demonstration(Mute(), chat, random.Random(0))

@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_demonstrations_are_cold_where_their_tasks_cannot_be_opened(error):
    class Closed:
        name = "closed"
        def demonstrate(self, rng): return toy.demonstrate(rng)
        def open(self, task, seed): raise error("no such task")
    shown = [warm_demonstration(Closed(), chat, random.Random(i), share=1.0) for i in range(20)]
    assert not any("<|feedback|>" in w.prompt for w in shown) and len({w.prompt for w in shown}) > 5

def test_the_format_and_the_tokenizer_of_an_environment():
    assert compact_format(toy).order == dict(look=[], pull=["lever"])
    tok, again = (demonstration_tokenizer(toy, chat, seed=3, n=50, vocab_size=400) for _ in range(2))
    assert tok.get_vocab() == again.get_vocab() and tok.eos_token == chat.stop
    assert all(len(tok(token, add_special_tokens=False)["input_ids"]) == 1 for token in chat.special)

# One page

def test_one_page_is_one_page(): assert len((ROOT / "experiments" / "one_page.py").read_text().splitlines()) <= 200

@pytest.mark.parametrize("seed", range(20))
def test_its_losses_are_those_of_the_package(seed):
    g, s = torch.Generator().manual_seed(seed), one_page.Settings()
    old = -torch.rand(8, 12, generator=g) * 3
    logp = (old + torch.randn(8, 12, generator=g) * 0.3).clone().requires_grad_()
    mask = (torch.rand(8, 12, generator=g) < 0.6).long()
    rewards = [round(float(x), 2) for x in torch.rand(8, generator=g)]
    adv = one_page.advantages(rewards)
    assert torch.allclose(adv, group_advantages(torch.tensor(rewards), torch.zeros(8, dtype=torch.long)), atol=1e-6)
    ours, (theirs, _) = one_page.dapo_loss(logp, old, adv, mask, s), dapo_loss(logp, old, adv, mask, s.clip_low, s.clip_high)
    assert abs((ours - theirs).item()) < 1e-6
    assert torch.allclose(*(torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs)), atol=1e-7)
    assert abs((one_page.replay_loss(logp, mask) - replay_loss(logp, mask)).item()) < 1e-6

@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.25] * 8])
def test_a_group_without_variance_is_dropped_by_both(rewards):
    assert one_page.advantages(rewards) is None and not keep_groups(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.long)).any()

def test_its_log_probabilities_are_those_of_sampling_and_of_the_package():
    s = one_page.Settings(warm_steps=3, steps=1, tasks=2, eval_every=1)
    torch.manual_seed(0)
    model, tok, c = one_page.warm_start(toy, s)
    groups = one_page.sample_groups(model, tok, c, toy, toy.tasks("train")[:2], s)
    rows = [r for group in groups for r in group]
    assert [len(group) for group in groups] == [8, 8] and all(r.feedback == "" for group in groups for r in group[:2]) and any(r.feedback for r in rows)
    ids, mask, old = one_page.pad([r.ids for r in rows]), one_page.pad([r.mask for r in rows])[:, 1:], one_page.pad([r.logp for r in rows], 0.0)[:, 1:]
    with torch.no_grad(): logp, theirs = one_page.token_logp(model, ids), token_logp(model(ids).logits[:, :-1], ids[:, 1:])
    assert torch.allclose(logp, theirs, atol=1e-5) and torch.allclose(logp[mask.bool()], old[mask.bool()], atol=1e-4)

def test_it_trains_and_the_curve_counts_rollouts():
    s = one_page.Settings(warm_steps=3, steps=2, tasks=2, eval_every=1, max_new=8)
    _, curve = one_page.train(toy, s, say=lambda line: None)
    assert [row["rollouts"] for row in curve] == [0, 16, 32] and all(0 <= row["cold"] <= 1 for row in curve)

def test_cold_success_rises_on_the_toy():
    torch.set_num_threads(1)
    _, curve = one_page.train(toy, one_page.Settings(warm_steps=350, steps=10, eval_every=10), say=lambda line: None)
    assert curve[0]["cold"] <= 0.1 and curve[-1]["cold"] >= 0.25 and curve[-1]["rollouts"] == 640
