"Files of a run: killed at any write, damaged in many ways, read in any locale, and never written by two processes."
import json, os, random, shutil, subprocess, sys
from pathlib import Path

import pytest

from fg_dapo import core
from fg_dapo.config import load_config
from fg_dapo.core import InUse, append_jsonl, hold_folder, printable, read_json, read_jsonl, to_json, write_jsonl
from fg_dapo.engines.local import checkpoints, train

from conftest import ROOT

TIMES = ("seconds", "peak_rss_mb")


def timeless(x):
    "The same without what a clock or the memory says."
    if isinstance(x, dict): return {k: timeless(v) for k, v in x.items() if k not in TIMES}
    return [timeless(v) for v in x] if isinstance(x, list) else x


def contents(run):
    "What the files of a run say."
    rows = {p.name: timeless(read_jsonl(p)) for p in sorted(run.glob("*.jsonl"))}
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = {p.name: p.read_bytes() for p in sorted(last.glob("*.safetensors"))}
    return rows, weights, timeless(read_json(last / "state.json"))


def settings_of(small, **more):
    return load_config(None, [*small, "train.eval_every=1", "train.eval_tasks=2", *(f"{k}={v}" for k, v in more.items())])


@pytest.fixture(scope="module")
def unbroken(raw_policy, tmp_path_factory):
    "A run that nothing disturbed, its settings, and how many writes it made."
    small = [f"policy.checkpoint={raw_policy}", f"data.folder={ROOT / 'data'}", "train.steps=3", "train.tasks_per_step=2",
        "train.rollouts=4", "train.checkpoint_every=1", "train.threads=1", "limits.max_new_tokens=12", "limits.tool_calls=3",
        "algorithm.transfer.updates=2", "algorithm.transfer.rows=4", "algorithm.transfer.mode=replay", "algorithm.transfer.oracle=true"]
    config, run, made = settings_of(small), tmp_path_factory.mktemp("unbroken") / "r", []
    whole = core.write_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "write_all", lambda fd, data: (made.append(1), whole(fd, data)))
        train(config, run, progress=False)
    return config, run, len(made)


def die_at(config, run, k):
    "Train in a process that dies in the middle of its k-th write."
    child = os.fork()
    if child == 0:
        whole, made = core.write_all, []
        def broken(fd, data):
            made.append(1)
            if len(made) == k:
                os.write(fd, data[:len(data) // 2])
                os._exit(9)
            whole(fd, data)
        core.write_all = broken
        try: train(config, run, progress=False)
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moments(n):
    "Twenty writes of n: the first ones, in which the first evaluation falls, and some drawn from a seed."
    first = list(range(1, 6))
    return first + sorted(random.Random(0).sample(range(6, n + 1), min(15, n - 5)))


def test_a_run_killed_at_any_write_ends_like_an_unbroken_one(unbroken, tmp_path):
    config, run, writes = unbroken
    expected = contents(run)
    for k in moments(writes):
        broken = tmp_path / f"killed-{k}"
        assert die_at(config, broken, k) == 9, k
        train(config, broken, progress=False)
        got = contents(broken)
        assert got[0] == expected[0], k
        assert got[1:] == expected[1:], k
        steps = [r["step"] for r in got[0]["evals.jsonl"]]
        assert steps == sorted(set(steps))
        shutil.rmtree(broken)


def cut(path): path.write_bytes(path.read_bytes()[:-7])
def drop(path): path.unlink()
def empty(path): path.write_bytes(b"")
def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


DAMAGES = {"weights cut": (cut, "model.safetensors"), "weights gone": (drop, "model.safetensors"), "weights empty": (empty, "model.safetensors"),
    "a bit of the weights": (flip, "model.safetensors"), "optimizer gone": (drop, "optimizer.safetensors"), "optimizer cut": (cut, "optimizer.safetensors"),
    "state empty": (empty, "state.json"), "state cut": (cut, "state.json"), "state gone": (drop, "state.json"), "config gone": (drop, "config.json"),
    "config empty": (empty, "config.json"), "tokenizer cut": (cut, "tokenizer.json")}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(unbroken, tmp_path, name, capfd):
    config, run, _ = unbroken
    copy = tmp_path / "r"
    shutil.copytree(run, copy)
    spoil, file = DAMAGES[name]
    victim = sorted((copy / "checkpoints").glob("step-*"))[-1] / file
    if file == "optimizer.safetensors": victim = next(victim.parent.glob("*optimizer.safetensors"))
    spoil(victim)
    train(config, copy, progress=False)
    assert "step-000003" in capfd.readouterr().err
    assert contents(copy) == contents(run)


def test_when_no_checkpoint_is_whole_one_line_says_what_to_do(unbroken, tmp_path):
    config, run, _ = unbroken
    copy = tmp_path / "r"
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"): empty(folder / "state.json")
    before = {p.name: p.read_bytes() for p in copy.glob("*.jsonl")}
    with pytest.raises(ValueError) as e: train(config, copy, progress=False)
    assert str(copy) in str(e.value) and "warmstart" not in str(e.value) and str(e.value).count("\n") == 0
    assert {p.name: p.read_bytes() for p in copy.glob("*.jsonl")} == before


def test_more_steps_can_be_asked_of_a_finished_run_and_nothing_else(unbroken, tmp_path):
    config, run, _ = unbroken
    copy = tmp_path / "r"
    shutil.copytree(run, copy)
    longer = config.model_copy(update=dict(train=config.train.model_copy(update=dict(steps=4))))
    train(longer, copy, progress=False)
    assert read_jsonl(copy / "metrics.jsonl")[-1]["step"] == 4
    other = longer.model_copy(update=dict(seed=config.seed + 1))
    with pytest.raises(ValueError, match="other settings"): train(other, copy, progress=False)


def test_a_second_process_is_refused_and_a_dead_one_blocks_nothing(unbroken, tmp_path):
    config, run, _ = unbroken
    code = "import sys\nfrom fg_dapo.core import hold_folder\nwith hold_folder(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    copy = tmp_path / "r"
    shutil.copytree(run, copy)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    holder = subprocess.Popen([sys.executable, "-c", code, str(copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InUse, match=f"in use by process {holder.pid}; .*kill {holder.pid}"):
        with hold_folder(copy): pass
    said = subprocess.run([sys.executable, "-m", "fg_dapo.cli", "train", "--set", "train.steps=3", "--out", str(copy)], capture_output=True, text=True, env=env)
    assert said.returncode == 1 and f"in use by process {holder.pid}" in said.stderr.replace("\n", " ")
    holder.kill()
    holder.wait()
    with hold_folder(copy): pass


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\r\n", "\n"]


@pytest.mark.parametrize("mark", SEPARATORS, ids=[repr(m) for m in SEPARATORS])
def test_a_line_separator_in_a_text_is_data(mark, tmp_path):
    rows = [dict(text=f"before{mark}after"), dict(text="next")]
    write_jsonl(tmp_path / "a.jsonl", rows[:1])
    append_jsonl(tmp_path / "a.jsonl", rows[1])
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()) == 2 or mark in "\r\n"


def test_a_torn_line_is_cut_before_the_next_row(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [dict(step=1)])
    with open(path, "ab") as f: f.write(b'{"step": 2, "text": "to')
    append_jsonl(path, dict(step=3))
    assert read_jsonl(path) == [dict(step=1), dict(step=3)]
    with open(path, "ab") as f: f.write(b'{"step": 4}')
    append_jsonl(path, dict(step=5))
    assert [r["step"] for r in read_jsonl(path)] == [1, 3, 4, 5]


@pytest.mark.parametrize("data, words", [(b'{"a": 1, "a": 2}', "'a'"), (b'{"a": NaN}', "NaN"), (b"\xff\xfe{\x00", "UTF-16"), (b'{"a": "\xff"}', "UTF-8"),
    (b'{"a": "\\ud83d"}', "surrogate"), (b"[" * 5000, ""), (b'{"a": 1e999}', "")], ids=["repeated key", "NaN", "UTF-16", "not UTF-8", "half", "deep", "huge"])
def test_a_file_that_is_wrong_is_named(data, words, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as e: read_json(path)
    assert str(path) in str(e.value) and words in str(e.value) and len(str(e.value)) < 500


def test_files_are_utf8_in_every_locale(tmp_path):
    code = "import sys\nfrom fg_dapo.core import *\nwrite_json(sys.argv[1], {'a': 'é✓'}); print(read_json(sys.argv[1]) == {'a': 'é✓'})"
    env = dict(os.environ, PYTHONPATH=str(ROOT), LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    script = tmp_path / "s.py"
    script.write_text("# coding: utf-8\n" + code, encoding="utf-8")
    said = subprocess.run([sys.executable, str(script), str(tmp_path / "a.json")], capture_output=True, text=True, env=env)
    assert said.stdout == "True\n", said.stderr
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + to_json(dict(a=1)).encode())
    assert read_json(tmp_path / "bom.json") == dict(a=1)


def test_control_characters_reach_no_terminal():
    for mark in ("\x1b[31m", "\x07", "\x9b2J", "\u202e", "\ud83d", "\x00"):
        shown = printable(f"a{mark}b")
        assert all(c.isprintable() for c in shown) and shown.startswith("a") and shown.endswith("b") and shown != "ab"
