"The planner: its arithmetic against published sizes, hand-computed sums and small models that are measured."
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from fg_dapo.config import RunConfig, check_config, load_config
from fg_dapo.engines.plan import (CARDS, GB, KINDS, QWEN3, Arch, Guess, activation_bytes, changed, choose_card, fallbacks, host_bytes, in_flight, kv_rows, layer_bytes, logit_bytes, phases,
    plan, read_arch, render, row_tokens, server_parts, shares, step_seconds)

from conftest import ROOT

CONFIGS = ("1gpu", "8x4090_lora", "8x4090_full", "cluster_14b", "cluster_32b")
SMALL = Arch("small", 64, 3, 4, 2, 32, 160, 50, False)

def shipped(name, *overrides): return load_config(ROOT / f"experiments/configs/verl_{name}.yaml", overrides)

def hf(a, **extra):
    return Qwen3Config(hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.head_dim, intermediate_size=a.intermediate,
        vocab_size=a.vocab, tie_word_embeddings=a.tied, attn_implementation="sdpa", **extra)

def phase(p, name): return next(x for x in p.phases if x.name == name)

@pytest.mark.parametrize("size, published", [("0.6B", 596_049_920), ("1.7B", 1_720_574_976), ("4B", 4_022_468_096), ("8B", 8_190_735_360), ("14B", 14_768_307_200), ("32B", 32_762_123_264)])
def test_parameters_are_those_of_the_published_model_and_of_the_module(size, published):
    a = QWEN3[f"Qwen3-{size}"]
    with torch.device("meta"): model = Qwen3ForCausalLM(hf(a))
    assert a.params == published == sum(p.numel() for p in model.parameters())
    assert a.layer == sum(p.numel() for p in model.model.layers[0].parameters())

def test_an_adapter_has_the_parameters_peft_gives_it():
    from peft import LoraConfig, get_peft_model
    for a in (SMALL, QWEN3["Qwen3-8B"]):
        with torch.device("meta"): model = get_peft_model(Qwen3ForCausalLM(hf(a)), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        assert a.lora(8) == sum(p.numel() for p in model.parameters() if p.requires_grad)

def test_a_folder_is_read_and_an_unknown_model_is_refused(tmp_path):
    hf(SMALL).save_pretrained(tmp_path)
    a = read_arch(tmp_path)
    assert (a.params, a.kv_bytes(), a.tied) == (SMALL.params, SMALL.kv_bytes(), False) and a.name == tmp_path.name
    assert read_arch("Qwen/Qwen3-4B-Base") is QWEN3["Qwen3-4B"]
    with pytest.raises(FileNotFoundError, match="'Qwen/Qwen3-72B', and no known model of that name; the nearest is 'Qwen/Qwen3-32B'"): read_arch("Qwen/Qwen3-72B")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama'"): read_arch(tmp_path)

def test_weights_gradients_adam_and_cache_are_measured_to_the_byte():
    model = Qwen3ForCausalLM(hf(SMALL))
    opt = torch.optim.AdamW(model.parameters())
    ids = torch.randint(SMALL.vocab, (2, 40))
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    s = shares(SMALL, check_config(dict(engine="verl", hardware=dict(gpus_per_node=1), train=dict(tasks_per_step=4))))
    assert s.weights == sum(p.nbytes for p in model.parameters())
    assert s.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert s.optimizer == sum(t.nbytes for state in opt.state.values() for k, t in state.items() if k != "step")
    with torch.no_grad(): cache = model(input_ids=ids, use_cache=True).past_key_values
    assert 80 * SMALL.kv_bytes(4) == sum(l.keys.nbytes + l.values.nbytes for l in cache.layers)

def kept(model, ids, mask=None):
    "Bytes that autograd keeps for the backward pass, parameters aside."
    own, seen = {p.untyped_storage()._cdata for p in model.parameters()}, {}
    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in own: seen[s._cdata] = s # Holds on to it, so that no address comes twice
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert out.logits.requires_grad
    return sum(s.nbytes() for s in seen.values())

@pytest.mark.parametrize("a", [SMALL, Arch("deep", 128, 8, 4, 4, 32, 384, 60, True), Arch("wide", 96, 5, 8, 2, 16, 256, 60, False)], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_within_two_percent_of_measured_ones(a, dtype, checkpointing):
    model = Qwen3ForCausalLM(hf(a)).to(dtype).train()
    if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    rows, length, f32 = 4, 64, dtype == torch.float32
    last = rows * length * (a.hidden * (12 if f32 else 8) + 4 + 8) # The last norm and the ids, which are in no layer
    measured = kept(model, torch.randint(a.vocab, (rows, length))) - last
    assert activation_bytes(a, rows * length, f32, checkpointing) == pytest.approx(measured, rel=0.02)

def test_padded_rows_keep_repeated_keys_and_values():
    a = Arch("grouped", 64, 6, 8, 2, 32, 128, 50, False)
    model, ids, mask = Qwen3ForCausalLM(hf(a)).train(), torch.randint(a.vocab, (4, 64)), torch.ones(4, 64, dtype=torch.long)
    mask[0, :20] = 0
    last, square = 4 * 64 * a.hidden * 12, 4 * 64 * 64 * 4 # And the mask itself
    packed, padded = kept(model, ids) - last, kept(model, ids, mask) - last
    assert layer_bytes(a, True, masked=True) > layer_bytes(a, True)
    assert activation_bytes(a, 256, True, False, masked=True) == pytest.approx(padded, rel=0.1) and activation_bytes(a, 256, True, False) == pytest.approx(packed, rel=0.1)
    assert padded > packed + square

class Peak(TorchDispatchMode):
    "Bytes of the tensors that are alive at the same time, at most."
    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.note(t.untyped_storage())
        return out
    def note(self, s):
        key, n = s._cdata, s.nbytes()
        if key in self.live: return
        self.live.add(key)
        self.now += n
        self.peak = max(self.peak, self.now)
        def gone():
            self.live.discard(key)
            self.now -= n
        weakref.finalize(s, gone)

def test_logits_are_within_ten_percent_of_what_verls_functions_use():
    import verl.utils.torch_functional as vf
    tokens, vocab = 192, 12_000
    h, w, y = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocab, 8), torch.randint(vocab, (tokens,))
    with torch.no_grad(), Peak() as look:
        logits = h @ w.T
        entropy, logp = vf.entropy_from_logits(logits), vf.logprobs_from_logits_v2(logits, y)
    del logits
    with Peak() as update:
        logits = h @ w.T
        out = vf.logprobs_from_logits_v2(logits, y)
        del logits
        out.sum().backward()
    assert logit_bytes(tokens, vocab, "log-probs", "sdpa", True) == pytest.approx(look.peak, rel=0.1)
    assert logit_bytes(tokens, vocab, "update", "sdpa", True) == pytest.approx(update.peak, rel=0.1)
    assert entropy.shape == logp.shape == (tokens,)

def test_memory_of_the_14b_cluster_computed_by_hand():
    p = plan(shipped("cluster_14b"))
    n, table = 14_768_307_200, 151_936 * 5120
    layer = 5120 * (5120 + 1024 + 1024 + 5120) + 3 * 5120 * 17408 + 2 * 5120 + 2 * 128 # q, k, v, o; MLP; norms
    assert p.arch.layer == layer == 330_311_936
    assert phase(p, "update").parts == {"weights": n * 4 // 16, "gradients": n * 4 // 16, "optimizer": n * 8 // 16, "overhead": 2 * GB,
        "gathered": table * (2 + 2 + 4), "activations": 10240 * 40 * 5120 * 2, "logits": 10240 * 151_936 * 2}
    assert phase(p, "optimizer step").parts["optimizer scratch"] == n * 4 // 16
    cache = int(0.6 * 80 * GB) - n * 2 // 2 - (10240 * 2 * (4 * 5120 + 17408) + 12 * 64 * 151_936) - GB
    assert phase(p, "generate").parts == {"weights": n * 4 // 16, "optimizer": n * 8 // 16, "overhead": 2 * GB, "server weights": n, "server work": 10240 * 2 * 37_888 + 116_686_848, "kv cache": cache}
    assert p.rows == cache // (10240 * 2 * 40 * 1024 * 2 // 2) and p.flying == 8 * 4 // 8
    assert phase(p, "weight sync").parts["sync buffer"] == 2 * GB + 2 * 4 * table and p.disk == 12 * n
    assert p.host == (6 + 32 + 16) * GB + 4 * n and p.tokens == 64 * (2048 + 2048)

def test_memory_of_an_adapter_and_of_offloading_computed_by_hand():
    lora, full = plan(shipped("8x4090_lora")), plan(shipped("8x4090_full"))
    n, adapter = 8_190_735_360, 36 * 32 * (2 * 8192 + 2 * 5120 + 3 * 16384)
    assert phase(lora, "update").parts["weights"] == (n + adapter) * 4 // 8 and phase(lora, "update").parts["gradients"] == adapter * 4 // 8
    assert phase(lora, "update").parts["optimizer"] == adapter * 8 // 8 and lora.disk == 4 * n + 12 * adapter
    assert phase(full, "update").parts == {"weights": 0, "overhead": 2 * GB, "gathered": 151_936 * 4096 * 8, "activations": 10240 * 36 * 4096 * 2, "logits": 10240 * 151_936 * 2}
    assert full.host == (6 + 32 + 8) * GB + 16 * n and lora.host == (6 + 32 + 8) * GB + 8 * (n + adapter) # vLLM keeps the base model in RAM while it sleeps, once a card
    half = plan(shipped("8x4090_full", "hardware.offload=optimizer"))
    assert phase(half, "generate").parts["optimizer"] == 0 and phase(half, "update").parts["optimizer"] == n * 8 // 8 # verl brings it back for the update
    assert not half.fits

def test_a_tied_table_stays_gathered_and_is_loaded_by_every_rank():
    p, n, table = plan(shipped("1gpu")), 596_049_920, 151_936 * 1024
    assert phase(p, "update").parts == {"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n, "overhead": 2 * GB, "gathered": table * 4, "activations": 6144 * 28 * 1024 * 2, "logits": 6144 * 151_936 * 2}
    two = changed(p.config, hardware=dict(gpus_per_node=2))
    assert host_bytes(p.arch, two) == (6 + 8 + 2) * GB + 2 * 4 * n

@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_configuration_loads_and_fits(name):
    text = (ROOT / f"experiments/configs/verl_{name}.yaml").read_text()
    p = plan(shipped(name))
    assert text.startswith("#") and "NOT been run on such hardware" in text
    assert p.fits and not p.problems and fallbacks(p.config) == [] and p.peak.total <= 0.98 * p.config.hardware.gpu_memory_gb * GB
    assert p.config.engine == "verl" and p.config.hardware.device == "cuda" and p.config.policy.chat == "hermes" and p.card is not None
    assert row_tokens(p.config) <= p.config.hardware.update_tokens and p.config.algorithm.feedback_guidance.max_feedback_tokens == 500
    assert p.config.algorithm.lr == p.config.algorithm.transfer.lr == (1e-5 if p.config.hardware.lora_rank else 1e-6)
    assert set(KINDS) >= {k for x in p.phases for k in x.parts}

def test_what_does_not_work_is_named_with_the_fix():
    bad = plan(shipped("8x4090_lora", "hardware.update_tokens=8192")).problems
    assert bad == ("hardware.update_tokens is 8192, below the longest row of 10240 tokens, and verl refuses that; set it to 10240",)
    bad = plan(shipped("8x4090_lora", "hardware.server_memory=0.4")).problems
    assert len(bad) == 1 and "holds no episode of 10240 tokens; raise hardware.server_memory or hardware.tensor_parallel" in bad[0]
    assert any("RAM and has 128 GB" in x for x in plan(shipped("8x4090_full", "hardware.host_memory_gb=128.0")).problems)
    alone = plan(shipped("8x4090_lora", "hardware.tensor_parallel=1"))
    assert any("holds no episode" in x for x in alone.problems) # 15 GB of weights leave no cache on a 24 GB card
    assert "8 key heads cannot be dealt out over 3 GPUs; set hardware.tensor_parallel to a divisor" in plan(shipped("1gpu", "hardware.gpus_per_node=3", "hardware.tensor_parallel=3", "train.tasks_per_step=12",
        "algorithm.transfer.rows=30")).problems
    note = plan(shipped("8x4090_lora", "algorithm.feedback_guidance.enable=false")).notes
    assert note == ("up to 16 episodes a server, 8 of full length fit its cache: when all grow that long, some wait",)

def test_fallbacks_come_in_the_plans_order_and_keep_what_was_given_up():
    tried = fallbacks(shipped("8x4090_lora", "hardware.attention=sdpa"))
    assert [x[0] for x in tried] == ["6 rollouts a task, 2 updates a step", "4 rollouts a task", "answers of 6144 tokens", "6 tasks a step, 1 updates a step", "4 tasks a step", "larger GPUs, more of them, or a smaller model"]
    now = [(c.train.rollouts, c.limits.max_response_tokens, c.train.tasks_per_step, c.hardware.update_tokens) for _, c, _ in tried]
    assert now == [(6, 8192, 8, 10240), (4, 8192, 8, 10240), (4, 6144, 8, 8192), (4, 6144, 6, 8192), (4, 6144, 4, 8192), (4, 6144, 4, 8192)]
    assert not any(q.fits for _, _, q in tried)
    tried = fallbacks(shipped("8x4090_full", "hardware.attention=sdpa", "limits.max_prompt_tokens=1536", "hardware.update_tokens=9728"))
    assert [(x[0], x[2].fits) for x in tried] == [("6 rollouts a task, 2 updates a step", False), ("4 rollouts a task", False), ("answers of 6144 tokens", True)]
    assert fallbacks(shipped("8x4090_lora")) == []

def test_a_step_that_does_not_divide_is_left_out():
    c = shipped("cluster_14b", "hardware.gpu_memory_gb=24.0")
    assert [x[0] for x in fallbacks(c)] == ["6 rollouts a task, 1 updates a step", "4 rollouts a task", "answers of 6144 tokens", "4 tasks a step", "larger GPUs, more of them, or a smaller model"]
    assert changed(c, train=dict(tasks_per_step=6, rollouts=4)) is None # 24 rows over 16 ranks

def test_episodes_in_flight():
    c = shipped("8x4090_lora")
    assert in_flight(c) == 8 * 4 # Waves of 2, 2 and 4
    assert in_flight(shipped("8x4090_lora", "algorithm.feedback_guidance.guided_share=0.5")) == 4 * 4 + 4 * 8
    assert in_flight(shipped("8x4090_lora", "algorithm.feedback_guidance.enable=false")) == 8 * 8

def test_time_by_hand():
    c = shipped("8x4090_full", "algorithm.feedback_guidance.enable=false", "algorithm.transfer.mode=none")
    s, a, g = step_seconds(QWEN3["Qwen3-8B"], c, CARDS[0]), QWEN3["Qwen3-8B"], Guess()
    forward = 2 * (8_190_735_360 - 151_936 * 4096) + 4 * 36 * 4096 * 2048 # A mean row has 4096 tokens, of which a token sees half
    assert s["update"] == pytest.approx(4 * s["log-probs"]) == pytest.approx(4 * 64 * 4096 * forward / (165e12 * 0.35 * 8))
    assert s["replay"] == 0
    width = min(16, kv_rows(a, c))
    reads = (2 * 8_190_735_360 + width * (2048 + 1024) * 147_456) / 2
    assert s["decode"] == pytest.approx(-(-16 // width) * 1024 * reads / (1008e9 * 0.6))
    lora = step_seconds(a, shipped("8x4090_lora"), CARDS[0])
    assert lora["update"] == pytest.approx(3 * lora["log-probs"]) # No gradient of the base weights
    waves = step_seconds(a, shipped("8x4090_full"), CARDS[0]) # Three waves, one after the other, of at most ceil(64 / 3 / 4) episodes a server
    assert waves["decode"] == pytest.approx(3 * 1024 * (2 * 8_190_735_360 + 6 * (2048 + 1024) * 147_456) / 2 / (1008e9 * 0.6)) and waves["waiting"] == 1.5
    assert choose_card(c).name == "RTX 4090" and choose_card(shipped("cluster_32b")).name == "A100-80" and choose_card(RunConfig()) is None
    faster = plan(shipped("cluster_14b"), card=CARDS[2])
    assert faster.rollouts_per_hour > plan(shipped("cluster_14b")).rollouts_per_hour and faster.card.name == "H100-80"
    assert sum(plan(c, Guess(response=0.5)).seconds.values()) > sum(plan(c, g).seconds.values())

def test_a_cpu_configuration_has_a_plan_without_time(raw_policy):
    p = plan(check_config(dict(engine="verl", policy=dict(checkpoint=str(raw_policy)), train=dict(tasks_per_step=8, rollouts=4), algorithm=dict(updates=2))))
    assert p.fits and p.card is None and p.seconds == {} and p.rollouts_per_hour is None
    assert phase(p, "update").parts["kv cache"] == 64 * 1024 * p.arch.kv_bytes(4) # vLLM does not sleep on a CPU
    assert p.host == 2 * p.peak.total and "time: not estimated for cpu" in render(p)

def test_render_shows_every_phase_and_what_was_tried():
    p = plan(shipped("8x4090_lora", "hardware.attention=sdpa"))
    text = render(p, fallbacks(p.config))
    for x in ("generate", "log-probs", "update", "optimizer step", "weight sync", "it does not fit", "PROBLEM: log-probs needs", "  1. 6 rollouts a task, 2 updates a step: peak", "  6. larger GPUs", "nothing here was run on such hardware"): assert x in text
    assert render(plan(shipped("8x4090_lora"))).endswith("it fits")

sizes = st.sampled_from(list(QWEN3))

@settings(max_examples=60, deadline=None)
@given(model=sizes, lora=st.sampled_from([0, 16, 64]), offload=st.sampled_from(["none", "optimizer", "all"]), gpus=st.sampled_from([1, 2, 4]), attention=st.sampled_from(["sdpa", "flash_attention_2"]))
def test_more_cards_never_need_more_of_one(model, lora, offload, gpus, attention):
    def of(n, **kw): return check_config(dict(engine="verl", policy=dict(checkpoint=f"Qwen/{model}"), train=dict(tasks_per_step=64), hardware=dict(device="cuda", dtype="bfloat16", lora_rank=lora, offload=offload,
        attention=attention, gpus_per_node=n, **kw)))
    a = QWEN3[model]
    for less, more in zip(phases(a, of(gpus)), phases(a, of(2 * gpus))): assert more.total <= less.total and more.name == less.name
    for one, two in zip(phases(a, of(2 * gpus)), phases(a, of(2 * gpus, nodes=2))): assert two.total <= one.total
    if gpus > 1: assert kv_rows(a, of(gpus, tensor_parallel=2)) >= kv_rows(a, of(gpus))
    assert all(v >= 0 for x in phases(a, of(gpus)) for v in x.parts.values())

@settings(max_examples=60, deadline=None)
@given(model=sizes, tokens=st.integers(1024, 16384), extra=st.integers(1, 8192))
def test_what_saves_memory_never_costs_any(model, tokens, extra):
    def of(**kw): return check_config(dict(engine="verl", policy=dict(checkpoint=f"Qwen/{model}"), hardware=dict(dict(device="cuda", dtype="bfloat16", attention="flash_attention_2", update_tokens=tokens), **kw)))
    a = QWEN3[model]
    def update(c): return phases(a, c)[2].total
    assert update(of(update_tokens=tokens + extra)) >= update(of())
    assert update(of(gradient_checkpointing=False)) >= update(of()) <= update(of(attention="sdpa"))
    assert update(of(lora_rank=32)) <= update(of()) and update(of(offload="all")) <= update(of())
    assert host_bytes(a, of(offload="all")) >= host_bytes(a, of(offload="optimizer")) >= host_bytes(a, of())
    assert server_parts(a, of(server_memory=0.9))["kv cache"] >= server_parts(a, of())["kv cache"]
