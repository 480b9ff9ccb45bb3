"The adapters for verl, each driven by verl's own machinery: its tool agent loop, its data loader, its reward manager."
import asyncio, gc, json, logging, pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerFast

import verl
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import ToolParser
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.tools.tool_registry import initialize_tools_from_config, load_all_tools
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.rollout.replica import TokenOutput

from fg_dapo.agent.chat import HermesChat, chat_format
from fg_dapo.agent.episode import Episode, Limits, Turn
from fg_dapo.agent.scripted import POLICIES, best_plan, follow, play
from fg_dapo.agent.tools import ToolCall, tool_schemas
from fg_dapo.core import rng_for
from fg_dapo.engines import verl_tools
from fg_dapo.engines.sampler import PromptTooLong, text_ids
from fg_dapo.engines.verl_tools import (AskUserTool, AuthInfoFormTool, CompanyDirectoryTool, CustomerServiceDataset, EpisodeTool, PhoneCallTool, Session, TranscriptRewardManager,
    check_tool_agent, flat_result, shown, task_row, DataOptions, tool_config, verl_score, write_tool_config)
from fg_dapo.method.reward import compute_score_with_feedback, replay_transcript, result_of, score_of
from fg_dapo.policy import load_policy
from fg_dapo.world.phone import PhoneSystemSimulator
from fg_dapo.world.records import as_dict, scenario_from_dict

from conftest import ROOT
from test_transcripts import ONE, as_ids, attacks, dialogue_of, play_ids, wild_script

TOOL_CONFIG = ROOT / "experiments" / "configs" / "tool_config.yaml"
OUT_OF_ORDER = '{"error": "the tool is out of order; the task cannot be finished"}'
HERMES = chat_format("hermes")

@pytest.fixture(scope="module")
def tiny(): return load_policy(ROOT / "data" / "tiny")[1]

@pytest.fixture(scope="module")
def chatml():
    "Every byte a token, with Qwen's marks and a chat template that writes what `HermesChat` writes."
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    out.chat_template = (
        "{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
        "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
        "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{%- if loop.first and tools %}{{ '\n\n# Tools\n\nThe signatures of the functions you may call:\n<tools>' }}{%- for t in tools %}{{ '\n' + t | tojson }}{%- endfor %}{{ '\n</tools>' }}{%- endif %}"
        "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}")
    return out

@pytest.fixture(scope="module")
def verl_config():
    "verl's own configuration, with overrides."
    def make(*overrides):
        with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None): return compose("ppo_trainer", list(overrides))
    return make

@pytest.fixture(scope="module")
def tools(): return load_all_tools(str(TOOL_CONFIG), None)

@pytest.fixture
def nothing_left():
    "No instance, no holder, no trajectory stays behind."
    yield
    gc.collect()
    assert (len(EpisodeTool.sessions), +EpisodeTool.holders, len(EpisodeTool.trajectories)) == (0, Counter(), 0)

def create_kwargs(s, **limits): return dict(scenario=as_dict(s), limits=dict(tool_calls=8, spare_phone_calls=1, multi_turn=False) | limits)

# verl's tool agent loop

class Script:
    "Stands for the model server: says the lines of the request it is asked for, one a turn."
    def __init__(self, tok): self.tok, self.lines, self.asked = tok, {}, []
    async def generate(self, request_id, prompt_ids, **kwargs):
        await asyncio.sleep(0) # Let the other trajectories run
        text = self.tok.decode(prompt_ids, skip_special_tokens=False)
        self.asked.append(request_id)
        key = next(k for k in self.lines if k in text)
        return TokenOutput(token_ids=self.tok(self.lines[key].pop(0), add_special_tokens=False)["input_ids"])

def loop_config(verl_config, *more):
    r = "actor_rollout_ref.rollout."
    return verl_config(f"{r}multi_turn.max_parallel_calls=8", f"{r}multi_turn.max_tool_response_length=4096", f"{r}multi_turn.tool_config_path={TOOL_CONFIG}", f"{r}prompt_length=8192",
        f"{r}response_length=16384", *more)

def run_loops(config, tok, tools, rows, lines):
    "Play rows side by side in verl's ToolAgentLoop; every line of every task comes from the script."
    server = Script(tok)
    server.lines = {row["prompt"][-1]["content"]: list(said) for row, said in zip(rows, lines)}
    assert len(server.lines) == len(rows)
    async def go():
        def one(row):
            loop = ToolAgentLoop(trainer_config=DictConfigWrap(config), server_manager=server, tokenizer=tok, processor=None, dataset_cls=CustomerServiceDataset,
                data_config=DictConfigWrap(config.data), hf_model_type="qwen3", tools=ToolListWrap(tools))
            return loop.run({}, raw_prompt=row["prompt"], tools_kwargs=row["extra_info"]["tools_kwargs"], extra_info=row["extra_info"])
        return await asyncio.gather(*map(one, rows))
    return asyncio.run(go()), server

def scripted(s, policy="oracle"):
    "Lines of a scripted policy, and its transcript as the package's own loop writes it."
    lines, text = [], []
    def watch(turn, replies):
        lines.append(HERMES.write(turn) + HERMES.stop)
        text.append(lines[-1] + HERMES.replies(replies))
    episode = play(POLICIES[policy](s, rng_for(0, "script")), s, watch=watch)
    return episode, [*lines, "Done." + HERMES.stop], "".join(text)

def tool_rows(scenarios): return [task_row(s, i, DataOptions(chat="hermes", agent="tool_agent")) for i, s in enumerate(scenarios)]

def distinct(scenarios): return list({s.task.request: s for s in scenarios}.values())

def test_all_tools_of_a_trajectory_share_an_episode_in_verls_own_loop(world, chatml, verl_config, tools, nothing_left):
    scenarios = distinct([s for s in world.scenarios("train") if s.task.ground_truth.ending == "served"])[:6]
    played = [scripted(s) for s in scenarios]
    # full_determinism gives all trajectories the same request id: it must not be what tells them apart
    outs, server = run_loops(loop_config(verl_config, "actor_rollout_ref.rollout.full_determinism=true"), chatml, tools, tool_rows(scenarios), [lines for _, lines, _ in played])
    assert set(server.asked) == {"det-0"} and len(server.asked) == sum(len(lines) for _, lines, _ in played)
    for s, out, (episode, lines, text) in zip(scenarios, outs, played):
        assert episode.ended == "served"
        assert chatml.decode(out.response_ids, skip_special_tokens=False) == text + "Done." + HERMES.stop # The ids of the loop are those of our own transcript
        rewards = out.extra_fields["tool_rewards"]
        assert len(rewards) == len(episode.log) and sum(rewards) == pytest.approx(1.0) and "tool_error" not in out.extra_fields

def test_what_the_model_wrote_is_trained_and_what_the_tools_said_is_not(world, chatml, verl_config, tools, nothing_left):
    s = world.scenarios("train")[0]
    _, lines, _ = scripted(s)
    [out], _ = run_loops(loop_config(verl_config), chatml, tools, tool_rows([s]), [lines])
    own = [i for i, m in zip(out.response_ids, out.response_mask) if m]
    assert chatml.decode(own, skip_special_tokens=False) == "".join(lines)

def test_bad_calls_in_verls_loop_are_answered(world, chatml, verl_config, tools, nothing_left):
    s = world.scenarios("train")[0]
    def say(name, arguments): return f'<tool_call>\n{json.dumps(dict(name=name, arguments=arguments))}\n</tool_call>' + HERMES.stop
    lines = [say("auth_info_form", "pin"), say("auth_info_form", dict(fields=["shoe_size"])), say("make_phone_call", dict(phone_number=5, auth_info={})),
        say("search_company", dict(company_name="\ud800")), say("hack", {}), say("auth_info_form", dict(fields=[])), "Sorry." + HERMES.stop]
    [out], _ = run_loops(loop_config(verl_config), chatml, tools, tool_rows([s]), [lines])
    text = chatml.decode(out.response_ids, skip_special_tokens=False)
    for part in ("arguments must be an object, got str", "unknown fields ['shoe_size']; valid fields: account_number", "phone_number must be string, got int", "cannot be written as JSON",
        "no tool 'hack'; the tools are", "fields is empty"): assert part in text
    assert out.extra_fields["tool_rewards"] == [0.0] * 6 and "tool_error" not in out.extra_fields

def test_a_tool_that_raises_scores_zero_and_is_recorded(world, chatml, verl_config, tools, nothing_left, monkeypatch, caplog):
    s = next(s for s in world.scenarios("train") if s.task.level == 3)
    _, lines, _ = scripted(s)
    calls = []
    def broken(self, number, info):
        calls.append(number)
        raise RuntimeError("line dead")
    monkeypatch.setattr(PhoneSystemSimulator, "handle_call", broken)
    with caplog.at_level(logging.ERROR): [out], _ = run_loops(loop_config(verl_config), chatml, tools, tool_rows([s]), [lines])
    assert out.extra_fields["tool_rewards"] == [0.0, 0.3, -0.3, 0.0] and len(calls) == 1 # What was won is lost, and the tool is not tried again
    assert out.extra_fields["tool_error"] == "RuntimeError in make_phone_call: line dead" and "the episode scores 0" in caplog.text
    text = chatml.decode(out.response_ids, skip_special_tokens=False)
    assert text.count(OUT_OF_ORDER) == 2
    monkeypatch.undo()
    row = tool_rows([s])[0]
    scored = verl_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"] | out.extra_fields)
    assert (scored["score"], scored["acc"], scored["pred"], scored["error"]) == (0.0, 0.0, "error", "RuntimeError in make_phone_call: line dead")
    assert verl_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])["score"] == 1.0 # Without the record, the replay would not know

# The tools by themselves

class Data:
    def __init__(self): self.extra_fields = {}

async def once(tool, data, parameters, kwargs):
    "A call as `ToolAgentLoop` makes it: an instance of its own."
    id, _ = await tool.create(create_kwargs=kwargs)
    try: return await tool.execute(id, parameters, agent_data=data)
    finally: await tool.release(id)

def test_step_rewards_are_milestones_and_penalties(world, nothing_left):
    s = next(s for s in world.scenarios("train") if s.task.level == 3 and s.user.tolerance)
    form, phone, data, kwargs = AuthInfoFormTool(), PhoneCallTool(), Data(), create_kwargs(s)
    plan = best_plan(s)
    told = {f: s.user.fields[f] for f in plan.form}
    async def go():
        steps = [(await once(form, data, dict(fields=list(plan.form)), kwargs))[1], (await once(form, data, dict(fields=["pin"]), kwargs))[1]]
        steps.append((await once(phone, data, dict(phone_number="nonsense"), kwargs))[1])
        for d in s.path: steps.append((await once(phone, data, dict(phone_number=d.phone, auth_info={f: told[f] for f in d.auth_fields}), kwargs))[1])
        return steps, await once(form, data, dict(fields=["pin"]), kwargs)
    steps, after = asyncio.run(go())
    assert steps == [0.3, -0.1, -0.05, 0.2, 0.5] and sum(steps) == pytest.approx(0.85) # Done, less a repeated form and a bad call
    assert after[0].text == '{"error": "the task is over (served)"}' and after[1:] == (0.0, dict(score=0.85, done=True))

def test_instances_with_one_id_share_an_episode_until_the_last_lets_go(world, nothing_left):
    s = next(s for s in world.scenarios("train") if s.task.level == 1)
    plan, form, phone = best_plan(s), AuthInfoFormTool(), PhoneCallTool()
    async def go():
        for t in (form, phone): assert (await t.create("a", create_kwargs=create_kwargs(s)))[0] == "a"
        assert await form.calc_reward("a") == 0.0
        await form.execute("a", dict(fields=list(plan.form)))
        assert await form.calc_reward("a") == await phone.calc_reward("a") == 0.3
        await form.release("a")
        [d] = s.path
        response, step, info = await phone.execute("a", dict(phone_number=d.phone, auth_info={f: s.user.fields[f] for f in plan.form}))
        assert info == dict(score=1.0, done=True) and step == 0.7 and await phone.calc_reward("a") == 1.0
        await phone.release("a")
        with pytest.raises(KeyError, match="PhoneCallTool: no instance 'a'; call create first"): await phone.execute("a", {})
        with pytest.raises(KeyError, match="no instance 'a'"): await form.calc_reward("a")
    asyncio.run(go())

def test_fabricating_loses_what_was_won(world, nothing_left):
    s = next(s for s in world.scenarios("train") if s.task.level == 1)
    data, kwargs = Data(), create_kwargs(s)
    async def go():
        await once(AuthInfoFormTool(), data, dict(fields=list(best_plan(s).form)), kwargs)
        return await once(PhoneCallTool(), data, dict(phone_number=s.path[0].phone, auth_info=dict(shoe_size="46")), kwargs)
    response, step, info = asyncio.run(go())
    assert step == -0.3 and info == dict(score=0.0, done=True) and "never gave shoe_size" in response.text

def test_ten_thousand_instances_leave_nothing(world, nothing_left):
    s, form = world.scenarios("train")[0], AuthInfoFormTool()
    kwargs = create_kwargs(s)
    async def go():
        datas, most = [Data() for _ in range(100)], 0
        for i in range(10_000):
            await once(form, datas[i % 100], dict(fields=["pin"]), kwargs)
            most = max(most, len(EpisodeTool.sessions))
        assert most == 0 and len(EpisodeTool.trajectories) == 100 # A call leaves nothing but the episode of its trajectory
        for i in range(1000): await form.create(f"id{i}", create_kwargs=kwargs)
        assert len(EpisodeTool.sessions) == 1000
        for i in range(1000): await form.release(f"id{i}")
    asyncio.run(go())

def test_a_row_without_a_scenario_is_an_error_that_names_the_fix(world, nothing_left):
    data = Data()
    response, step, info = asyncio.run(once(AuthInfoFormTool(), data, dict(fields=["pin"]), dict(limits={})))
    assert response.text == OUT_OF_ORDER and (step, info) == (0.0, dict(score=0.0, done=True))
    assert "has no 'scenario' (it is ['limits'])" in data.extra_fields["tool_error"] and "data.fg_dapo.agent=tool_agent" in data.extra_fields["tool_error"]

def test_tools_refuse_what_is_not_theirs():
    with pytest.raises(ValueError, match="AuthInfoFormTool: unknown config colour; there are type and companies"): AuthInfoFormTool(dict(colour="red"))
    other = OpenAIFunctionToolSchema.model_validate(tool_schemas()[1])
    with pytest.raises(ValueError, match="AuthInfoFormTool: the schema of 'search_company' is not that of 'auth_info_form'.*write_tool_config"): AuthInfoFormTool({}, other)

def test_ask_user_answers_in_a_multi_turn_episode_only(world, nothing_left):
    s = next(s for s in world.scenarios("train") if "pin" in s.user.fields and s.user.behavior == "cooperative")
    def ask(multi_turn): return asyncio.run(once(AskUserTool(), Data(), dict(question="What is your PIN?"), create_kwargs(s, multi_turn=multi_turn)))[0].text
    assert s.user.fields["pin"] in ask(True) and "no tool 'ask_user'" in ask(False)

def test_search_knows_the_companies_of_its_file(world, nothing_left):
    s, other = world.scenarios("train")[0], world.scenarios("val")[-1].company.name
    def search(**config): return asyncio.run(once(CompanyDirectoryTool(config), Data(), dict(company_name=other), create_kwargs(s)))[0].text
    assert other != s.company.name and "error" in json.loads(search())
    assert json.loads(search(companies=str(ROOT / "data" / "companies.json")))["company"] == other

# tool_config.yaml

def test_the_committed_file_is_what_the_function_writes(tmp_path):
    assert TOOL_CONFIG.read_text() == write_tool_config(tmp_path / "t.yaml").read_text()
    assert yaml.safe_load(TOOL_CONFIG.read_text()) == tool_config()

@pytest.mark.parametrize("multi_turn", [False, True])
def test_verls_loader_gives_the_schemas_of_agent_tools(multi_turn, tmp_path):
    path = str(write_tool_config(tmp_path / "t.yaml", multi_turn, ROOT / "data" / "companies.json"))
    for loaded in (initialize_tools_from_config(path), load_all_tools(path, None)):
        assert [shown(t.tool_schema) for t in loaded] == tool_schemas(multi_turn)
        assert [type(t) for t in loaded] == [AuthInfoFormTool, CompanyDirectoryTool, PhoneCallTool, AskUserTool][:3 + multi_turn]
        assert all(len(t.directory) == 100 for t in loaded)

def test_an_edited_schema_is_refused(tmp_path):
    raw = tool_config()
    raw["tools"][0]["tool_schema"]["function"]["description"] = "Ask as often as you like."
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="write the file again with write_tool_config"): initialize_tools_from_config(str(tmp_path / "t.yaml"))

# The data set

DATA = ("data.custom_cls.path=pkg://fg_dapo.engines.verl_tools", "data.custom_cls.name=CustomerServiceDataset", f"data.train_files={ROOT}/data/train_tasks.jsonl",
    f"data.val_files={ROOT}/data/val_tasks.jsonl", "data.max_prompt_length=256", "data.seed=7")

def dataset(config, tok, train=True, max_samples=-1):
    d = config.data
    return create_rl_dataset(d.train_files if train else d.val_files, d, tok, None, is_train=train, max_samples=max_samples)

def loader(config, tok, batch_size=8, workers=0, **kwargs):
    "The train loader as verl's trainer builds it."
    ds = dataset(config, tok, **kwargs)
    return StatefulDataLoader(dataset=ds, batch_size=batch_size, num_workers=workers, drop_last=True, collate_fn=collate_fn, sampler=create_rl_sampler(config.data, ds))

class Stream:
    "Batches as verl's trainer takes them: at the end of an epoch it begins the next."
    def __init__(self, loader): self.loader, self.it = loader, None
    def next(self):
        try:
            if self.it is None: self.it = iter(self.loader)
            batch = next(self.it)
        except StopIteration:
            self.it = iter(self.loader)
            batch = next(self.it)
        return [x["task_id"] for x in batch["extra_info"]]

def test_batches_have_verls_fields_and_ours(world, tiny, verl_config):
    c = verl_config(*DATA, "+data.fg_dapo.detail=hint", "+data.fg_dapo.limits.tool_calls=6")
    batch = next(iter(loader(c, tiny)))
    assert set(batch) == {"prompt", "raw_prompt", "data_source", "ability", "agent_name", "reward_model", "extra_info", "index", "tools_kwargs", "interaction_kwargs", "dummy_tensor"}
    assert batch["dummy_tensor"].shape == (8, 1) and all(batch[k].shape == (8,) and batch[k].dtype == object for k in batch if k != "dummy_tensor")
    tasks = {s.task.id: (i, s) for i, s in enumerate(world.scenarios("train"))}
    for i in range(8):
        extra = batch["extra_info"][i]
        index, s = tasks[extra["task_id"]]
        assert extra == dict(index=index, split="train", task_id=s.task.id, level=s.task.level, heldout=False, chat="compact", detail="hint",
            limits=dict(tool_calls=6, spare_phone_calls=1, multi_turn=False), agent="customer_service", tools_kwargs={})
        assert batch["index"][i] == index and batch["data_source"][i] == "fg_dapo/train" and batch["agent_name"][i] == "customer_service" and batch["ability"][i] == "customer_service"
        assert batch["raw_prompt"][i] == [dict(role="user", content=s.task.request)]
        assert batch["reward_model"][i] == dict(style="rule", ground_truth=as_dict(s)) and scenario_from_dict(batch["reward_model"][i]["ground_truth"]) == s

def test_every_row_of_every_option_has_the_same_keys(world):
    scenarios = world.scenarios("val")
    for o in (DataOptions(), DataOptions(chat="hermes"), DataOptions(chat="hermes", agent="tool_agent", limits=Limits(multi_turn=True))):
        rows = [task_row(s, i, o) for i, s in enumerate(scenarios)]
        assert len({(tuple(r), tuple(r["extra_info"]), tuple(r["extra_info"]["tools_kwargs"])) for r in rows}) == 1
    assert list(rows[0]["extra_info"]["tools_kwargs"]) == ["auth_info_form", "search_company", "make_phone_call", "ask_user"]
    assert {r["extra_info"]["heldout"] for r in rows} == {True, False}

def test_messages_are_the_prompt_of_the_loop_that_reads_them(world, chatml):
    s = world.scenarios("val")[0]
    own, verls = (task_row(s, 0, DataOptions(chat="hermes", agent=a))["prompt"] for a in ("customer_service", "tool_agent"))
    assert chatml.apply_chat_template(own, tokenize=False, add_generation_prompt=True) == HERMES.prompt(s.task.request)
    assert "<tools>" in own[0]["content"] and "<tools>" not in verls[0]["content"]

def test_sizes_follow_the_file_the_options_and_verls_argument(tiny, verl_config):
    c = verl_config(*DATA, "+data.fg_dapo.max_tasks=40")
    assert (len(dataset(c, tiny)), len(dataset(c, tiny, max_samples=10)), len(dataset(c, tiny, train=False)), len(dataset(c, tiny, train=False, max_samples=30))) == (40, 10, 100, 30)
    val = dataset(c, tiny, train=False, max_samples=30)
    assert c.data.shuffle and [val[i]["extra_info"]["task_id"] for i in range(30)] == [f"val-{i:04}" for i in range(30)] # The first, not a draw
    assert {val[i]["data_source"] for i in range(30)} == {"fg_dapo/val"}

def test_order_comes_from_the_seed(tiny, verl_config):
    def order(seed, n=70):
        s = Stream(loader(verl_config(*DATA, f"data.seed={seed}"), tiny))
        return [s.next() for _ in range(n)]
    a = order(7)
    assert a == order(7) != order(8)
    first, second = sum(a[:62], []), sum(a[62:], [])
    assert len(set(first)) == 62 * 8 and second != first[:64] # 500 tasks are 62 batches of 8

@pytest.mark.parametrize("stop, workers", [(1, 0), (3, 0), (5, 0), (6, 0), (10, 0), (3, 1), (5, 1)]) # 40 tasks in batches of 8: an epoch is 5
def test_resume_goes_on_where_it_stopped(stop, workers, tiny, verl_config, tmp_path):
    c = verl_config(*DATA, "+data.fg_dapo.max_tasks=40")
    whole = Stream(loader(c, tiny, workers=workers))
    expected = [whole.next() for _ in range(15)]
    assert [len(set(sum(expected[i:i + 5], []))) for i in (0, 5, 10)] == [40, 40, 40]
    before = Stream(loader(c, tiny, workers=workers))
    assert [before.next() for _ in range(stop)] == expected[:stop]
    torch.save(before.loader.state_dict(), tmp_path / "data.pt") # As verl's checkpoint does
    after = Stream(loader(c, tiny, workers=workers))
    after.loader.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=False))
    assert [after.next() for _ in range(15 - stop)] == expected[stop:]

def test_a_pickled_data_set_comes_back_by_verls_hook(tiny, verl_config):
    ds = dataset(verl_config(*DATA, "+data.fg_dapo.max_tasks=5"), tiny)
    other = pickle.loads(pickle.dumps(ds))
    assert not hasattr(other, "dataframe")
    other.resume_dataset_state()
    assert len(other) == 5 and other[4]["extra_info"] == ds[4]["extra_info"]

def test_split_gives_equal_parts(tiny, verl_config):
    ds = dataset(verl_config(*DATA, "+data.fg_dapo.max_tasks=7"), tiny)
    assert [[p[i]["index"] for i in range(len(p))] for p in ds.split(3)] == [[0, 1], [2, 3], [4, 5]]
    for n in (0, 8, 1.5):
        with pytest.raises(ValueError, match=f"cannot split 7 tasks into {n} parts; choose 1 to 7"): ds.split(n)

def test_a_row_is_fresh(tiny, verl_config):
    ds = dataset(verl_config(*DATA), tiny)
    ds[0]["extra_info"]["num_turns"] = 3
    ds[0]["raw_prompt"].clear()
    assert "num_turns" not in ds[0]["extra_info"] and ds[0]["raw_prompt"]

@pytest.mark.parametrize("filtering", [True, False])
def test_long_prompts_are_refused_with_the_numbers(filtering, world, tiny, verl_config):
    lengths = {s.task.id: len(tiny(chat_format("compact").prompt(s.task.request), add_special_tokens=False)["input_ids"]) for s in world.scenarios("train")}
    top = max(lengths.values())
    assert len(dataset(verl_config(*DATA, f"data.max_prompt_length={top}"), tiny)) == 500
    c = verl_config(*DATA, f"data.max_prompt_length={top - 1}", f"data.filter_overlong_prompts={filtering}")
    with pytest.raises(PromptTooLong) as e: dataset(c, tiny)
    named = max(t for t, n in lengths.items() if n == top)
    assert str(e.value).startswith(f"{sum(n == top for n in lengths.values())} of 500 prompts are over data.max_prompt_length={top - 1}; the longest, of {named}, has {top} tokens")

def test_the_tool_agents_prompt_is_measured_with_its_tools(world, chatml, verl_config):
    more = ("+data.fg_dapo.chat=hermes", "+data.fg_dapo.agent=tool_agent", "+data.fg_dapo.max_tasks=3", f"actor_rollout_ref.rollout.multi_turn.tool_config_path={TOOL_CONFIG}")
    ds = dataset(verl_config(*DATA, *more, "data.max_prompt_length=8192"), chatml)
    expected = [len(chatml(chatml.apply_chat_template(ds[i]["prompt"], tools=tool_schemas(), tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"]) for i in range(3)]
    assert ds.prompt_lengths(ds.dataframe) == expected and min(expected) > 1500
    with pytest.raises(PromptTooLong, match="3 of 3 prompts"): dataset(verl_config(*DATA, *more, "data.max_prompt_length=1500"), chatml)
    with pytest.raises(ValueError, match="tool_config_path=None gave no tools; set"): dataset(verl_config(*DATA, *more[:3]), chatml)

@pytest.mark.parametrize("override, text", [
    ("+data.fg_dapo.chat=markdown", "data.fg_dapo.chat: Input should be 'compact' or 'hermes' (got 'markdown')"),
    ("+data.fg_dapo.colour=red", "data.fg_dapo.colour: Unexpected keyword argument (got 'red'); there are chat, detail, limits, max_tasks, agent"),
    ("+data.fg_dapo.limits.calls=3", "data.fg_dapo.limits.calls"),
    ("+data.fg_dapo.max_tasks=0", "data.fg_dapo.max_tasks"),
    ("+data.fg_dapo.agent=tool_agent", "writes Hermes tool calls (got 'compact'); set chat to hermes"),
    (f"data.train_files={ROOT}/data/users.jsonl", "users.jsonl: no task file; expected train_tasks.jsonl, val_tasks.jsonl, test_tasks.jsonl"),
    ("data.train_files=hdfs://x/train_tasks.jsonl", "tasks are read from a local folder"),
    ("data.train_files=/nowhere/train_tasks.jsonl", "/nowhere/companies.json")])
def test_what_is_wrong_is_named(override, text, tiny, verl_config):
    with pytest.raises(ValueError) as e: dataset(verl_config(*[o for o in DATA if o.partition("=")[0] != override.partition("=")[0]], override), tiny)
    assert text in str(e.value)

def test_nothing_is_written_beside_the_data(tiny, verl_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    before = sorted(p.name for p in (ROOT / "data").iterdir())
    ds = dataset(verl_config(*DATA, f"+data.cache_dir={tmp_path / 'cache'}", "data.filter_overlong_prompts=true"), tiny)
    assert len(ds) == 500 and sorted(p.name for p in (ROOT / "data").iterdir()) == before and list(tmp_path.iterdir()) == []

# The reward

REWARD = ("reward.reward_manager.source=importlib", "reward.reward_manager.name=TranscriptRewardManager", "reward.reward_manager.module.path=pkg://fg_dapo.engines.verl_tools")

def transcripts(s, chat, policy):
    "An episode of a scripted policy, and its text after the prompt."
    fmt, text = chat_format(chat), []
    episode = play(POLICIES[policy](s, rng_for(1, policy)), s, watch=lambda turn, replies: text.append(fmt.write(turn) + fmt.stop + (fmt.replies(replies) if replies else "")))
    return episode, "".join(text)

def proto(row, responses, prompts=None, **more):
    "What a reward worker gets: outputs of one session, padded on the right as the agent loop pads them."
    prompts = prompts or [[1] * 5 for _ in responses]
    n = len(responses)
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    kwargs = {k: row[k] for k in ("data_source", "reward_model", "extra_info")}
    return DataProto.from_dict(tensors=dict(prompts=pad(prompts), responses=pad(responses), attention_mask=pad([[1] * (len(p) + len(r)) for p, r in zip(prompts, responses)])),
        non_tensors={**{k: np.array([v] * n, dtype=object) for k, v in kwargs.items()}, **more})

def reward(config, tok, data): return asyncio.run(load_reward_manager(config, tok).run_single(data))

@pytest.mark.parametrize("chat", ["compact", "hermes"])
@pytest.mark.parametrize("policy", ["oracle", "random", "ask_everything", "fabricate", "no_op"])
def test_score_and_feedback_through_verl_are_the_episodes_own(chat, policy, world, tiny, chatml, verl_config):
    tok, config = (tiny if chat == "compact" else chatml), verl_config(*REWARD)
    manager = load_reward_manager(config, tok)
    assert type(manager) is TranscriptRewardManager
    for s in world.scenarios("val")[::9]:
        episode, text = transcripts(s, chat, policy)
        row = task_row(s, 0, DataOptions(chat=chat))
        out = asyncio.run(manager.run_single(proto(row, [tok(text, add_special_tokens=False)["input_ids"]])))
        assert out["reward_extra_info"] == flat_result(result_of(episode)) and out["reward_score"] == out["reward_extra_info"]["score"]
        assert {k: v for k, v in out["reward_extra_info"].items() if k in ("score", "acc", "pred")} == {k: v for k, v in compute_score_with_feedback("x", text, as_dict(s), dict(chat=chat)).items() if k in ("score", "acc", "pred")}
        if policy == "oracle": assert out["reward_score"] == 1.0 and out["reward_extra_info"]["feedback"] == ""
        else: assert out["reward_extra_info"]["feedback"]

def test_keys_are_fixed_and_values_are_numbers_and_strings(world):
    seen = set()
    for s in world.scenarios("val")[:20]:
        for policy in POLICIES: seen.add(tuple((k, type(v)) for k, v in verl_score("x", transcripts(s, "compact", policy)[1], as_dict(s)).items()))
    seen.add(tuple((k, type(v)) for k, v in verl_score("x", "", as_dict(s), dict(tool_error="dead", turn_marks=True)).items()))
    assert len(seen) == 1
    kinds = dict(seen.pop())
    assert {k for k, v in kinds.items() if v is str} == {"pred", "feedback", "error"} and {v for v in kinds.values()} == {str, float}
    assert list(kinds)[:5] == ["score", "acc", "pred", "feedback", "error"] and all(k.startswith("partial_") for k in list(kinds)[5:]) and len(kinds) == 15

def test_verls_validation_metrics_take_the_result(world):
    rows = [(s, verl_score("x", transcripts(s, "compact", p)[1], as_dict(s))) for s in world.scenarios("val")[:4] for p in ("oracle", "no_op")]
    infos = {k: [r[k] for _, r in rows] for k in rows[0][1]}
    got = process_validation_metrics(["fg_dapo/val"] * 8, [s.task.id for s, _ in rows], infos)["fg_dapo/val"]
    assert got["acc"]["mean@2"] == got["score"]["mean@2"] == 0.5 and got["partial_done"]["mean@2"] == 0.5 and "feedback" not in got

def test_verls_own_manager_loses_the_turns_and_is_refused(world, chatml, verl_config):
    s = world.scenarios("val")[0]
    row = task_row(s, 0, DataOptions(chat="hermes"))
    data = proto(row, [chatml(transcripts(s, "hermes", "oracle")[1], add_special_tokens=False)["input_ids"]])
    async def go(): return await NaiveRewardManager(verl_config(), chatml, verl_score).run_single(data)
    with pytest.raises(ValueError, match="has no '<|im_end|>'.*reward.reward_manager.name=TranscriptRewardManager"): asyncio.run(go())

def test_a_transcript_cut_in_its_first_turn_is_out_of_turns(world, tiny, verl_config):
    s, config = world.scenarios("val")[0], verl_config(*REWARD)
    text = transcripts(s, "compact", "oracle")[1]
    row, ids = task_row(s, 0, DataOptions()), tiny(text, add_special_tokens=False)["input_ids"]
    assert reward(config, tiny, proto(row, [ids]))["reward_score"] == 1.0
    cut = reward(config, tiny, proto(row, [ids[:3]])) # The length ran out in the first turn: no mark at all
    assert (cut["reward_score"], cut["reward_extra_info"]["pred"]) == (0.0, "out_of_turns")

def test_the_last_of_several_outputs_is_scored_whole(world, tiny, verl_config):
    "verl pads the outputs of a session to one length; the last columns of the mask are then not the response of a shorter one."
    s, config = world.scenarios("val")[0], verl_config(*REWARD)
    ids = tiny(transcripts(s, "compact", "oracle")[1], add_special_tokens=False)["input_ids"]
    row, prompts = task_row(s, 0, DataOptions()), [[1] * 60, [1] * 20] # The same answer under a long and a short prompt
    data = proto(row, [ids, ids], prompts, response_len=np.array([len(ids)] * 2))
    assert int(data[-1:].batch["attention_mask"][0][-len(ids):].sum()) == len(ids) - 40
    assert reward(config, tiny, data)["reward_score"] == 1.0
    mine = proto(row, [ids, ids], prompts)
    assert reward(config, tiny, mine)["reward_score"] < 1.0 # What the mask alone would give

def test_a_simulator_that_raises_in_the_replay_scores_zero_and_is_recorded(world, monkeypatch, caplog):
    s = world.scenarios("val")[0]
    text = transcripts(s, "compact", "oracle")[1]
    def broken(*a): raise RuntimeError("line dead")
    monkeypatch.setattr(PhoneSystemSimulator, "handle_call", broken)
    out = verl_score("x", text, as_dict(s))
    assert (out["score"], out["acc"], out["pred"], out["error"]) == (0.0, 0.0, "error", "RuntimeError in the replay: line dead") and "could not be replayed" in caplog.text
    with pytest.raises(ValueError): verl_score("x", text, dict(task={})) # A ground truth that is none is a programmer's error

def test_a_setting_that_drops_calls_is_refused(world, chatml, verl_config):
    s = world.scenarios("val")[0]
    row = tool_rows([s])[0]
    data = proto(row, [chatml(transcripts(s, "hermes", "oracle")[1], add_special_tokens=False)["input_ids"]])
    with pytest.raises(ValueError, match=r"max_parallel_calls=1 drops calls that count; set it to 8 \(limits.tool_calls\) or more"): reward(verl_config(*REWARD), chatml, data)
    assert reward(verl_config(*REWARD, "actor_rollout_ref.rollout.multi_turn.max_parallel_calls=8"), chatml, data)["reward_score"] == 1.0

def test_what_the_agent_loop_adds_reaches_the_score(world, tiny, verl_config):
    s = world.scenarios("val")[0]
    row, ids = task_row(s, 0, DataOptions()), tiny(transcripts(s, "compact", "oracle")[1], add_special_tokens=False)["input_ids"]
    data = proto(row, [ids], tool_extra_fields=np.array([dict(tool_error="RuntimeError in search_company: gone")], dtype=object))
    out = reward(verl_config(*REWARD), tiny, data)
    assert out["reward_score"] == 0.0 and out["reward_extra_info"]["error"] == "RuntimeError in search_company: gone" and "tool_error" not in row["extra_info"]

def test_a_custom_reward_function_is_used(world, tiny, verl_config, tmp_path):
    (tmp_path / "mine.py").write_text("def score(data_source, solution_str, ground_truth, extra_info=None, bonus=0): return dict(score=bonus + solution_str.count('<|end|>'))\n")
    s = world.scenarios("val")[0]
    text = transcripts(s, "compact", "oracle")[1]
    data = proto(task_row(s, 0, DataOptions()), [tiny(text, add_special_tokens=False)["input_ids"]])
    c = verl_config(*REWARD, f"reward.custom_reward_function.path={tmp_path / 'mine.py'}", "reward.custom_reward_function.name=score", "+reward.custom_reward_function.reward_kwargs.bonus=10")
    assert reward(c, tiny, data)["reward_score"] == 10 + text.count("<|end|>") > 10

# What verl's tool agent plays is what is scored

class Says:
    "Stands for the model server of one trajectory: turns of ids, then last words."
    def __init__(self, tok, turns): self.tok, self.turns = tok, list(turns)
    async def generate(self, **kwargs): return TokenOutput(token_ids=self.turns.pop(0) if self.turns else text_ids(self.tok, "Done." + HERMES.stop))

def tool_agent_plays(config, tok, tools, row, turns):
    "A trajectory of verl's tool agent: its output."
    async def go():
        loop = ToolAgentLoop(trainer_config=DictConfigWrap(config), server_manager=Says(tok, turns), tokenizer=tok, processor=None, dataset_cls=CustomerServiceDataset,
            data_config=DictConfigWrap(config.data), hf_model_type="qwen3", tools=ToolListWrap(tools))
        return await loop.run({}, raw_prompt=row["prompt"], tools_kwargs=row["extra_info"]["tools_kwargs"], extra_info=row["extra_info"])
    return asyncio.run(go())

def score_of_output(manager, row, out):
    "What verl's reward worker makes of it."
    extra = np.empty(1, dtype=object)
    extra[0] = {k: v for k, v in out.extra_fields.items()}
    return asyncio.run(manager.run_single(proto(row, [out.response_ids], response_len=np.array([len(out.response_ids)]), tool_extra_fields=extra)))

def same_by_the_tool_agent(s, turns, multi_turn, tok, config, tools, manager):
    "The score of one transcript by our loop, our text, verl's tools as it is played, and verl's reward: one number."
    limits = Limits(multi_turn=multi_turn)
    live, rollout = play_ids(dialogue_of(s, chat_format("hermes", multi_turn), tok, limits), turns)
    row = task_row(s, 0, DataOptions(chat="hermes", agent="tool_agent", limits=limits))
    out = tool_agent_plays(config, tok, tools, row, turns)
    scored = score_of_output(manager, row, out)
    want = flat_result(result_of(live))
    assert scored["reward_extra_info"] == want and abs(scored["reward_score"] - score_of(live)) < 1e-9
    assert "tool_error" not in out.extra_fields
    calls = replay_transcript([t.removesuffix(HERMES.stop) for t, _ in rollout.transcript.turns if t.endswith(HERMES.stop)], s, "hermes", limits=limits)
    if not live.last_word: assert abs(sum(out.extra_fields["tool_rewards"]) - score_of(live)) < 1e-9 # The tools see all but the last word
    return score_of(calls)

@pytest.fixture(scope="module")
def tool_agent(verl_config, tmp_path_factory):
    def make(multi_turn):
        path = write_tool_config(tmp_path_factory.mktemp("tools") / "t.yaml", multi_turn)
        return loop_config(verl_config, *REWARD, f"actor_rollout_ref.rollout.multi_turn.tool_config_path={path}", "actor_rollout_ref.rollout.response_length=200000"), load_all_tools(str(path), None)
    return make

@pytest.mark.parametrize("multi_turn", [False, True])
def test_wild_transcripts_score_the_same_by_verls_tool_agent(multi_turn, chatml, tool_agent, nothing_left):
    config, tools = tool_agent(multi_turn)
    manager, scores = load_reward_manager(config, chatml), Counter()
    for i in range(500):
        s, turns = wild_script(i, HERMES, chatml, multi_turn)
        scores[same_by_the_tool_agent(s, turns, multi_turn, chatml, config, tools, manager)] += 1
    assert len(scores) >= 6 and 0.0 in scores and 1.0 in scores, scores

@pytest.mark.parametrize("how", ["special", "spelled"])
def test_every_attack_scores_the_same_by_verls_tool_agent(how, chatml, tool_agent, nothing_left):
    config, tools = tool_agent(False)
    manager = load_reward_manager(config, chatml)
    for attack, turns, score, ended in attacks("hermes"):
        got = same_by_the_tool_agent(ONE, [as_ids(chatml, HERMES, t, how) for t in turns], False, chatml, config, tools, manager)
        assert (attack, got) == (attack, pytest.approx(score, abs=1e-9))

def test_a_stop_token_in_the_middle_ends_the_turn(chatml, tool_agent, nothing_left):
    "Sampling stops at it; where a server goes on, what stands behind it is nobody's turn."
    config, tools = tool_agent(False)
    manager = load_reward_manager(config, chatml)
    search, form, call = [t for _, t, _, _ in attacks("hermes")][0]
    frame = "\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    for turns, score in (([search, form + HERMES.stop + frame + call], 0.3), ([search + HERMES.stop + frame + form, form, "Done." + HERMES.stop + frame + call], 0.3)):
        ids = [text_ids(chatml, t + HERMES.stop) for t in turns]
        assert same_by_the_tool_agent(ONE, ids, False, chatml, config, tools, manager) == score

def test_a_turn_that_fills_the_response_is_not_carried_out(chatml, verl_config, tool_agent, nothing_left):
    "verl ends an episode there without a look at the turn, also when its stop token just fits."
    config, tools = tool_agent(False)
    row, turns = tool_rows([ONE])[0], [text_ids(chatml, t + HERMES.stop) for t in [t for _, t, _, _ in attacks("hermes")][0]]
    whole = tool_agent_plays(config, chatml, tools, row, turns)
    length = max(end for _, end in whole.extra_fields["own_turns"])
    config.actor_rollout_ref.rollout.response_length = length
    out, manager = tool_agent_plays(config, chatml, tools, row, turns), load_reward_manager(config, chatml)
    assert len(out.response_ids) == length and out.response_ids[-1] == chatml.eos_token_id
    assert score_of_output(manager, row, out)["reward_score"] == sum(out.extra_fields["tool_rewards"]) == 0.3

@pytest.mark.parametrize("name", ["compact", "hermes"])
def test_our_ids_score_the_same_by_the_reward_manager(name, tiny, chatml, verl_config):
    chat, tok = chat_format(name), tiny if name == "compact" else chatml
    manager = load_reward_manager(verl_config(*REWARD), tok)
    for i in range(500):
        s, turns = wild_script(i, chat, tok, "ids")
        live, rollout = play_ids(dialogue_of(s, chat, tok), turns)
        response = rollout.ids[rollout.mask.index(1):] if 1 in rollout.mask else []
        out = asyncio.run(manager.run_single(proto(task_row(s, 0, DataOptions(chat=name)), [response], response_len=np.array([len(response)]))))
        assert out["reward_extra_info"] == flat_result(result_of(live)), i

@pytest.mark.parametrize("setting, value", [("max_parallel_calls", 7), ("max_assistant_turns", 8), ("max_user_turns", 7), ("format", "qwen3_coder")])
def test_settings_under_which_the_tool_agent_plays_something_else_are_refused(setting, value, verl_config):
    good = dict(format="hermes", max_parallel_calls=8, max_assistant_turns=9, max_user_turns=8)
    check_tool_agent(good, 8)
    with pytest.raises(ValueError, match=f"multi_turn.{setting}={value!r} .*(set it to|leave it out)"): check_tool_agent(good | {setting: value}, 8)

def test_other_tools_keep_verls_parser(chatml):
    other = OpenAIFunctionToolSchema.model_validate(dict(type="function", function=dict(name="add", description="", parameters=dict(type="object", properties={}, required=[]))))
    parser = ToolParser.get_tool_parser("hermes", chatml)
    async def calls(text): return (await parser.extract_tool_calls(text_ids(chatml, text), [other]))[1]
    [call] = asyncio.run(calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'))
    assert (call.name, call.arguments) == ("add", '{"a": 1}')

def test_a_model_that_writes_the_carrying_key_gains_nothing(chatml, tool_agent, nothing_left):
    config, tools = tool_agent(False)
    search, form, call = [t for _, t, _, _ in attacks("hermes")][0]
    inner = json.loads(call.split("\n")[1])
    forged = json.dumps(dict(name="auth_info_form", arguments={verl_tools.CARRIED: dict(inner, error=None)}))
    turns = [text_ids(chatml, t + HERMES.stop) for t in (search, form, f"<tool_call>{forged}</tool_call>")]
    assert same_by_the_tool_agent(ONE, turns, False, chatml, config, tools, load_reward_manager(config, chatml)) == 0.25
