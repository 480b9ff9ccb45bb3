"""The command line as its users meet it: help, wrong arguments, errors, stopping, the demo's processes."""
import errno, json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fg_dapo.demo as demo
from fg_dapo.cli import app, explain, find_runs
from fg_dapo.config import RunConfig
from fg_dapo.core import write_json
from fg_dapo.demo import Job, last_checkpoint, plan, results, run_jobs
from fg_dapo.doctor import Check, check_checkpoint, check_data, diagnose, ready

COMMANDS = ("check", "export-env", "new-env", "data", "validate", "warmstart", "train", "evaluate", "report", "doctor", "demo", "config", "plan", "export", "matrix", "results")
ROOT = Path(__file__).resolve().parent.parent

def ask(*args):
    "Exit status and everything printed."
    r = CliRunner().invoke(app, [str(a) for a in args])
    if r.exception and not isinstance(r.exception, SystemExit): raise r.exception
    return r.exit_code, r.output

@pytest.fixture
def empty(tmp_path, monkeypatch):
    "An empty folder to work in."
    monkeypatch.chdir(tmp_path)
    return tmp_path

def model(folder):
    "A folder that looks like a model."
    folder.mkdir(parents=True)
    for n in ("config.json", "model.safetensors", "tokenizer.json"): (folder / n).write_text("{}")
    return folder

# Help

def test_the_commands_are_those_of_the_readme():
    assert sorted(c.name or c.callback.__name__ for c in app.registered_commands) == sorted(COMMANDS)
    text = (ROOT / "README.md").read_text()
    assert all(f"fg-dapo {c}" in text for c in ("doctor", "config", "train", "evaluate", "report", "data", "warmstart"))

@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_with_an_example(command):
    code, said = ask(command, "--help")
    assert code == 0 and "Example" in said and f"fg-dapo {command}" in said

@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command):
    click = typer.main.get_command(app).commands[command]
    assert [p.name for p in click.params if not getattr(p, "help", None)] == []

def test_the_first_page():
    code, said = ask("--help")
    assert code == 0 and all(c in said for c in COMMANDS)
    assert ask("--version") == (0, __import__("fg_dapo").__version__ + "\n")

# Wrong arguments

@pytest.mark.parametrize("args, words", [
    (["trian"], ["trian", "train"]),
    (["train", "--config", "none.yaml"], ["none.yaml", "experiments/configs"]),
    (["train", "--set", "train.step=3"], ["train.step", "'train.steps'"]),
    (["train", "--set", "steps"], ["'steps'", "section.key=value"]),
    (["train", "--seed", "1"], ["--seed"]),
    (["train", "--set", "engine=verl", "--set", "hardware.dtype=bfloat16"], ["hardware.dtype=bfloat16", "set dtype to float32"]),
    (["train"], ["'data'", "fg-dapo data --out data"]),
    (["evaluate"], ["checkpoint"]),
    (["evaluate", "none"], ["'none'", "fg-dapo warmstart"]),
    (["evaluate", "x", "--split", "tset"], ["tset", "'test'"]),
    (["evaluate", "x", "--samples", "0"], ["--samples", "0"]),
    (["report"], ["runs"]),
    (["report", "none"], ["'none'", "fg-dapo train"]),
    (["validate", "--data", "none"], ["none/companies.json"]),
    (["data", "--seed", "-1"], ["--seed", "-1"]),
    (["data", "--seed", "one"], ["--seed", "one"]),
    (["warmstart", "--steps", "0"], ["--steps", "0"]),
    (["demo", "--config", "none.yaml"], ["none.yaml"]),
    (["demo", "--config", ROOT / "experiments/configs/demo.yaml", "--arms", "dapo,fg_reply"], ["fg_reply", "'fg_replay'"]),
    (["demo", "--config", ROOT / "experiments/configs/demo.yaml"], ["data.folder", "fg-dapo data"]),
    (["demo", "--jobs", "0"], ["--jobs", "0"]),
    (["config", "--set", "seed=x"], ["seed", "'x'"]),
])
def test_wrong_arguments_name_the_value_and_the_way_out(empty, args, words):
    code, said = ask(*args)
    assert code != 0 and "Traceback" not in said
    for w in words: assert w in said
    assert not (empty / "runs" / "train").exists()

def test_a_missing_model_is_refused_before_torch_is_imported(empty):
    (empty / "data").symlink_to(ROOT / "data")
    code = "import sys\nfrom fg_dapo.cli import app\ntry: app(['train', '--set', 'policy.checkpoint=none'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert r.stdout.strip() == "1 False" and "policy.checkpoint" in r.stderr and "fg-dapo warmstart" in r.stderr

# The verl engine's commands

def test_a_dry_run_prints_what_verl_gets_and_starts_nothing(empty):
    code, said = ask("train", "-c", ROOT / "experiments/configs/verl_8x4090_lora.yaml", "--dry-run", "--set", "algorithm.clip_high=0.3", "--set", "train.rollouts=4")
    lines = dict(x.split("=", 1) for x in said.splitlines())
    assert code == 0 and lines["actor_rollout_ref.actor.clip_ratio_high"] == "0.3" and lines["actor_rollout_ref.rollout.n"] == "4" and lines["trainer.n_gpus_per_node"] == "8"
    assert lines["actor_rollout_ref.model.path"] == "Qwen/Qwen3-8B" and lines["actor_rollout_ref.model.lora_rank"] == "32" and not (empty / "runs").exists()
    code, said = ask("train", "--dry-run")
    assert code == 1 and "engine: local" in said

@pytest.mark.parametrize("script, arm, guided", [("run_baseline_dapo.sh", "dapo", "false"), ("run_feedback_guided_dapo.sh", "fg_replay", "true")])
def test_the_launch_scripts_differ_in_the_method_only(script, arm, guided):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    r = subprocess.run(["bash", str(ROOT / "experiments/configs" / script), "--dry-run"], capture_output=True, text=True, env=env, timeout=120)
    assert r.returncode == 0, r.stderr
    run = json.loads(next(x for x in r.stdout.splitlines() if x.startswith("+fg_dapo=")).split("config:", 1)[1].split(",out:")[0].strip("'").replace("\\'", "'"))
    assert run["arm"] == arm and str(run["algorithm"]["feedback_guidance"]["enable"]).lower() == guided and run["seed"] == 0
    rest = [x for x in r.stdout.splitlines() if not x.startswith(("+fg_dapo=", "trainer.experiment_name", "trainer.default_local_dir"))]
    other = subprocess.run(["bash", str(ROOT / "experiments/configs/run_baseline_dapo.sh"), "--dry-run"], capture_output=True, text=True, env=env, timeout=120).stdout.splitlines()
    assert rest == [x for x in other if not x.startswith(("+fg_dapo=", "trainer.experiment_name", "trainer.default_local_dir"))]

@pytest.mark.parametrize("package", ["hydra", "omegaconf", "verl"])
def test_a_dry_run_without_verl_prints_and_says_what_was_not_checked(empty, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None) # As if it were not installed
    for name in [n for n in sys.modules if n.startswith(f"{package}.")]: monkeypatch.delitem(sys.modules, name)
    code, said = ask("train", "-c", ROOT / "experiments/configs/verl_8x4090_lora.yaml", "--dry-run")
    assert code == 0 and "trainer.n_gpus_per_node=8" in said and "fg_dapo[verl-cpu]" in said and "not installed here" in said and "Traceback" not in said

@pytest.mark.parametrize("package, args, words", [
    ("openai", ["--set", "algorithm.feedback_guidance.use_llm_enhancement=true"], ["algorithm.feedback_guidance.use_llm_enhancement", "pip install 'fg_dapo[llm]'"]),
    ("ray", ["--set", "engine=verl"], ["ray is not installed", "fg_dapo[verl-cpu]"]),
    ("verl", ["--set", "engine=verl"], ["verl is not installed", "fg_dapo[verl-cpu]"]),
    ("torch", [], ["torch is not installed", "fg_dapo[local]"]),
])
def test_a_missing_package_is_named_with_the_extra_and_nothing_is_written(empty, raw_policy, monkeypatch, package, args, words):
    for name in [n for n in sys.modules if n.split(".")[0] == package or n == "fg_dapo.engines.local"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, said = ask("train", *args, "--set", f"data.folder={ROOT / 'data'}", "--set", f"policy.checkpoint={raw_policy}", "--out", "run")
    assert code == 1 and "Traceback" not in said and "defect" not in said and not (empty / "run").exists(), said
    for w in words: assert w in said

@pytest.mark.parametrize("address, words", [("http://localhost:8265", "write localhost:6379"), ("https://head:8265/", "write head:6379"), ("localhost", "write localhost:6379"), ("ray://head", "write head:6379"), ("head:port", "ray://head:10001"), ("head:6379 ", "RAY_ADDRESS: 'head:6379 '")])
@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_an_address_that_ray_cannot_be_joined_at_is_answered_with_the_right_form(empty, raw_policy, monkeypatch, address, words, more):
    monkeypatch.setenv("RAY_ADDRESS", address)
    code, said = ask("train", "--set", "engine=verl", "--set", f"data.folder={ROOT / 'data'}", "--set", f"policy.checkpoint={raw_policy}", "--out", "run", *more)
    assert code == 1 and words in said and "auto (a cluster" in said and not (empty / "run").exists()

@pytest.mark.parametrize("name, words", [
    ("http://localhost:8000/v1", ["is an address", "a model is a folder on this machine"]), ("https://huggingface.co/Qwen/Qwen3-8B", ["is an address"]), ("s3://bucket/model", ["is an address"]),
    ("Qwen/Qwen3-8B", ["nothing is downloaded unasked", "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B"]), ("none", ["there is no model 'none'", "fg-dapo warmstart"]), ("here", ["no model in 'here'"]), ("a\x1b[31mb", ["a\\x1b[31mb"])])
def test_what_a_model_may_be_is_said_where_it_is_none(empty, name, words):
    (empty / "here").mkdir()
    code, said = ask("evaluate", name, "--data", ROOT / "data")
    assert code == 1 and "Traceback" not in said and "\x1b" not in said
    for w in words: assert w in said

def test_a_home_that_no_shell_expanded(empty, monkeypatch):
    monkeypatch.setenv("HOME", str(empty))
    assert ask("data", "--out=~/world")[0] == 0 and (empty / "world/companies.json").is_file()
    assert ask("validate", "--data", "~/world")[0] == 0 and not (empty / "~").exists()

def test_prompts_that_cannot_fit_are_refused_before_anything_is_written(empty, raw_policy):
    args = ["train", "--set", f"data.folder={ROOT / 'data'}", "--set", f"policy.checkpoint={raw_policy}", "--out", "run"]
    code, said = ask(*args, "--set", "limits.max_prompt_tokens=200")
    assert code == 1 and "limits.max_prompt_tokens" in said and not (empty / "run").exists()

def test_demo_and_evaluate_check_the_data_before_anything_is_written(empty, raw_policy):
    (empty / "d").mkdir()
    for f in (ROOT / "data").glob("*.json*"): (empty / "d" / f.name).write_bytes(f.read_bytes())
    (empty / "d/val_tasks.jsonl").write_text("{}\n")
    for args in (["evaluate", raw_policy, "--data", "d", "--out", "out"], ["demo", "-c", ROOT / "experiments/configs/demo.yaml", "--set", "data.folder=d", "--set", f"policy.checkpoint={raw_policy}", "--out", "out"]):
        code, said = ask(*args)
        assert code == 1 and "d/val_tasks.jsonl:1: id: Field required" in said and not (empty / "out").exists()

def test_all_that_is_missing_is_said_at_once(empty):
    code, said = ask("train")
    assert code == 1 and "2 things are wrong" in said and "data.folder" in said and "policy.checkpoint" in said

def test_the_plan_says_whether_a_run_fits(empty):
    code, said = ask("plan", "-c", ROOT / "experiments/configs/verl_8x4090_lora.yaml")
    assert code == 0 and "it fits" in said and "not a measurement" in said
    code, said = ask("plan", "-c", ROOT / "experiments/configs/verl_8x4090_full.yaml", "--set", "hardware.gpu_memory_gb=12.0")
    assert code == 1 and "does not fit" in said

def test_export_copies_the_policy_and_nothing_else(tmp_path, raw_policy):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    code, said = ask("export", raw_policy, "--out", tmp_path / "full")
    assert code == 1 and "not empty" in said
    code, said = ask("export", raw_policy, "--out", tmp_path / "model")
    assert code == 0 and (tmp_path / "model/model.safetensors").read_bytes() == (raw_policy / "model.safetensors").read_bytes()
    assert ask("evaluate", tmp_path / "model", "--data", ROOT / "data", "--limit", "1", "--mode", "cold", "--out", tmp_path / "eval")[0] == 0

# Errors

@pytest.mark.parametrize("error, lines", [
    (ValueError("a\nb"), ["a", "b"]),
    (KeyError("no split 'x'; there are train"), ["no split 'x'; there are train"]),
    (KeyError("x"), None),
    (KeyError(3), None),
    (TypeError("x"), None),
    (BrokenPipeError(32, "Broken pipe"), None),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), ["a.json: No such file"]),
    (OSError(errno.ENOSPC, "could not write a.json: No space left on device"), ["could not write a.json: No space left on device"]),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), ["torch is not installed; pip install 'fg_dapo[local]', or make env in a checkout"]),
    (ModuleNotFoundError("No module named 'fg_dapo.x'", name="fg_dapo.x"), None),
    (ModuleNotFoundError("No module named 'hydra.core'", name="hydra.core"), ["hydra is not installed; pip install 'fg_dapo[verl-cpu]' (verl-gpu on a machine with GPUs), or make env-dev in a checkout"]),
    (ModuleNotFoundError("No module named 'openai'", name="openai"), ["openai is not installed; pip install 'fg_dapo[llm]', or make env-dev in a checkout"]),
    (ModuleNotFoundError("No module named 'strange'", name="strange"), ["strange is not installed; pip install strange"]),
    (ImportError("feedback needs openai: pip install 'fg_dapo[llm]'"), ["feedback needs openai: pip install 'fg_dapo[llm]'"]),
    (ImportError("libcuda.so.1: cannot open shared object file", name="torch"), ["a package does not work here: libcuda.so.1: cannot open shared object file"]),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"), None),
])
def test_which_errors_are_the_users(error, lines):
    assert explain(error) == lines

def broken(monkeypatch, error):
    "Make `fg-dapo config` raise."
    def load_config(*a): raise error
    monkeypatch.setattr("fg_dapo.config.load_config", load_config)

def test_a_known_error_is_plain_lines(monkeypatch):
    broken(monkeypatch, ValueError("one\ntwo"))
    assert ask("config") == (1, "error: 2 things are wrong:\n       one\n       two\n")

def test_traceback_shows_it(monkeypatch):
    broken(monkeypatch, ValueError("one"))
    with pytest.raises(ValueError, match="one"): ask("--traceback", "config")

@pytest.mark.parametrize("error", [TypeError("ours"), KeyError(3), AssertionError(), RecursionError("deep\ndeep"), MemoryError(), ZeroDivisionError("division by zero"), RuntimeError("\x1b[31mred \ud800"),
    UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), AttributeError("'NoneType' object has no attribute 'x'"), ModuleNotFoundError("No module named 'fg_dapo.x'", name="fg_dapo.x")], ids=lambda e: type(e).__name__)
def test_a_defect_is_one_line_that_says_where_its_traceback_is(monkeypatch, tmp_path, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken(monkeypatch, error)
    for n in (1, 2): # The second file does not replace the first
        code, said = ask("config")
        kept = Path(said.strip().rpartition(" ")[2])
        assert code == 1 and said.count("\n") == 1 and said.startswith(f"error: {type(error).__name__}") and "Traceback" not in said and "\x1b" not in said
        assert len(list(tmp_path.iterdir())) == n and kept.parent == tmp_path and "Traceback (most recent call last)" in kept.read_text() and "load_config" in kept.read_text()
    with pytest.raises(type(error)): ask("--traceback", "config")

def test_ctrl_c_says_how_to_go_on(monkeypatch):
    broken(monkeypatch, KeyboardInterrupt())
    assert ask("config") == (130, "stopped; run the same command to resume\n")

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_with_130(number):
    code = "import fg_dapo.config as c, time\nfrom fg_dapo.cli import app\ndef f(*a): print('here', flush=True); time.sleep(60)\nc.load_config = f\napp(['config'])"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert p.stdout.readline() == "here\n"
    p.send_signal(number)
    _, err = p.communicate(timeout=20)
    assert (p.returncode, err) == (130, "stopped; run the same command to resume\n")

def test_a_polite_kill_lets_a_trainer_that_handles_ctrl_c_finish_its_step():
    code = ("import fg_dapo.config as c, signal, time\nfrom fg_dapo.cli import app\nasked = []\ndef f(*a):\n    signal.signal(signal.SIGINT, lambda *_: asked.append(1))\n    print('here', flush=True)\n"
            "    while not asked: time.sleep(.01)\n    print('saved', flush=True)\n    raise KeyboardInterrupt\nc.load_config = f\napp(['config'])")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert p.stdout.readline() == "here\n"
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=20)
    assert (p.returncode, out) == (130, "saved\n")

def test_a_reader_that_goes_away_is_no_error():
    r = subprocess.run(f"{sys.executable} -m fg_dapo.cli config | head -1", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert r.stdout.startswith("engine: local") and "Traceback" not in r.stderr and "error" not in r.stderr

# Data

def test_data_writes_keeps_refuses_and_forces(empty):
    assert ask("data", "--seed", 1)[0] == 0
    first = {p.name: p.read_bytes() for p in (empty / "data").iterdir()}
    assert len(first) == 5
    stamp = (empty / "data" / "companies.json").stat().st_mtime_ns
    assert ask("data", "--seed", 1)[0] == 0 and (empty / "data" / "companies.json").stat().st_mtime_ns == stamp
    (empty / "data" / "companies.json").write_text("[]")
    code, said = ask("data", "--seed", 1)
    assert code == 1 and "companies.json" in said and "--force" in said and "user_profiles.json" not in said
    assert (empty / "data" / "companies.json").read_text() == "[]"
    assert ask("data", "--seed", 1, "--force")[0] == 0
    assert {p.name: p.read_bytes() for p in (empty / "data").iterdir()} == first

@pytest.mark.parametrize("version", [1, 2])
def test_data_of_either_version_are_written_and_valid(empty, version):
    code, said = ask("data", "--world-version", version, "--seed", 4)
    assert code == 0 and f"version {version}" in said and ask("validate")[0] == 0
    rows = [json.loads(x) for x in (empty / "data/train_tasks.jsonl").read_text().splitlines()]
    assert {r.get("world_version", 1) for r in rows} == {version} and isinstance(json.loads((empty / "data/companies.json").read_text()), list if version == 1 else dict)
    assert ask("data", "--world-version", 3 - version, "--seed", 4)[0] == 1 # The other version is other data
    assert ask("data", "--world-version", 3)[0] == 2

def test_validate_names_every_error_and_changes_nothing(empty):
    for f in (ROOT / "data").glob("*.json*"): (empty / f.name).write_bytes(f.read_bytes())
    assert ask("validate", "--data", ".")[0] == 0
    rows = [json.loads(x) for x in (empty / "val_tasks.jsonl").read_text().splitlines()]
    rows[0]["level"], rows[4]["company_id"] = 9, "c-none"
    (empty / "val_tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    before = {f.name: f.read_bytes() for f in empty.iterdir()}
    code, said = ask("validate", "--data", ".")
    assert code == 1 and "val_tasks.jsonl:1: level" in said and "val_tasks.jsonl:5:" in said and "c-none" in said
    assert {f.name: f.read_bytes() for f in empty.iterdir()} == before

def test_warmstart_keeps_a_model_that_is_there(empty):
    model(empty / "m")
    code, said = ask("warmstart", "--out", "m")
    assert code == 1 and "--force" in said

# Doctor

def test_doctor_fails_where_something_needed_is_missing(empty):
    code, said = ask("doctor")
    assert code == 1 and "fg-dapo data --out data" in said and "fg-dapo warmstart" in said

def test_doctor_sees_good_and_bad_data(empty):
    assert check_data(ROOT / "data").status == "ok"
    for f in (ROOT / "data").glob("*.json*"): (empty / f.name).write_bytes(f.read_bytes())
    (empty / "companies.json").write_text("[{}]")
    bad = check_data(empty)
    assert bad.status == "missing" and "companies.json" in bad.found and "fg-dapo validate" in bad.fix

def test_every_failed_check_has_a_fix(empty):
    checks = diagnose("none", "none")
    assert not ready(checks) and all(c.fix for c in checks if c.status == "missing")
    assert ready([Check("a", "ok", ""), Check("b", "note", "")])

def test_a_model_folder_is_recognised(empty):
    assert check_checkpoint(model(empty / "m")).status == "ok"
    (empty / "m" / "tokenizer.json").unlink()
    assert "tokenizer.json" in check_checkpoint(empty / "m").found

# Runs and checkpoints

def test_the_last_checkpoint_is_the_latest_step_and_not_the_alphabets(empty):
    for n in (9, 10, 100): model(empty / "run" / "checkpoints" / f"step-{n}")
    model(empty / "run" / "checkpoints" / ".step-110") # Half written when the run was killed
    assert last_checkpoint(empty / "run").name == "step-100"
    assert last_checkpoint(empty / "run" / "checkpoints" / "step-9").name == "step-9"
    with pytest.raises(FileNotFoundError, match="no model in"): last_checkpoint(empty / "none")

def test_runs_are_found_once_each(empty):
    for n in "ab": write_json(empty / "runs" / n / "manifest.json", {})
    assert [r.name for r in find_runs(["runs", "runs/a"])] == ["a", "b"]

# The demo's processes

WORK = """
import json, sys, time
from pathlib import Path
stage, name = sys.argv[1], sys.argv[2]
log = Path("log.txt")
with log.open("a") as f: f.write(f"+{name}.{stage}\\n")
if "boom" in name and stage == "train": print("it burst"); sys.exit(3)
time.sleep(float(sys.argv[3]))
with log.open("a") as f: f.write(f"-{name}.{stage}\\n")
"""

@pytest.fixture
def jobs(empty, monkeypatch):
    "Arms whose stages are a short script that writes down when it runs."
    (empty / "work.py").write_text(WORK)
    (empty / "arms.yaml").write_text("arms: {one: , two: , boom: , last: }")
    def start(job, stage):
        (empty / "out" / "logs").mkdir(parents=True, exist_ok=True)
        with open(empty / "out" / "logs" / f"{job.name}.{stage}.log", "w") as f:
            return subprocess.Popen([sys.executable, "work.py", stage, job.config.arm, str(jobs_seconds[0])], stdout=f, stderr=f)
    jobs_seconds = [.15]
    monkeypatch.setattr(demo, "start", start)
    def make(*names, seconds=.15):
        jobs_seconds[0] = seconds
        return plan("arms.yaml", "out", names)
    return make

def log(): return Path("log.txt").read_text().split() if Path("log.txt").exists() else []

def test_stages_run_in_order_and_no_more_arms_than_asked(jobs):
    assert run_jobs(jobs("one", "two", "last"), 2, lambda s: None, pause=.01) == []
    running, most = set(), 0
    for x in log():
        (running.add if x[0] == "+" else running.discard)(x[1:])
        most = max(most, len(running))
    assert most == 2 and len(log()) == 12
    for n in ("one", "two", "last"): assert [x for x in log() if n in x] == [f"+{n}.train", f"-{n}.train", f"+{n}.evaluate", f"-{n}.evaluate"]

def test_what_is_finished_is_not_done_again(jobs):
    run_jobs(jobs("one"), 1, lambda s: None, pause=.01)
    said, n = [], len(log())
    assert run_jobs(jobs("one"), 1, said.append, pause=.01) == [] and len(log()) == n
    assert any("train is done already" in s for s in said)

def test_other_settings_are_other_work(jobs, empty):
    (job,) = jobs("one")
    run_jobs([job], 1, lambda s: None, pause=.01)
    (other,) = plan("arms.yaml", "out", ["one"], ["train.steps=3"])
    (more,) = plan("arms.yaml", "out", ["one"], eval_tasks=5)
    assert job.finished("train") and not other.finished("train") and more.finished("train") and not more.finished("evaluate")

def test_an_arm_that_fails_is_named_and_the_others_go_on(jobs):
    said = []
    failed = run_jobs(jobs("boom", "one", "last"), 1, said.append, pause=.01)
    assert len(failed) == 1 and "boom-s0: train failed (exit 3)" in failed[0] and "boom-s0.train.log" in failed[0]
    assert any("it burst" in s for s in said) and "-last.evaluate" in log() and "+boom.evaluate" not in log()

def test_stopping_stops_the_processes(jobs):
    started = []
    real = demo.start
    def start(job, stage):
        started.append(real(job, stage))
        return started[-1]
    demo.start = start
    def say(s):
        if "train" in s and len(started) == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_jobs(jobs("one", "two", seconds=60), 2, say, pause=.01)
    assert started and all(p.poll() is not None for p in started)
    assert not jobs("one")[0].finished("train")

def test_a_process_that_does_not_stop_is_killed():
    p = subprocess.Popen([sys.executable, "-c", "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"], stdout=subprocess.PIPE)
    p.stdout.readline()
    demo.stop([p], wait=.2)
    assert p.wait(5) == -signal.SIGKILL

def test_the_written_settings_are_those_of_the_command(jobs):
    from fg_dapo.config import load_config
    (job,) = jobs("two")
    assert load_config(job.settings) == job.config and job.commands()["train"][2] == str(job.settings)

def test_the_commands_of_a_job_are_commands_of_ours(empty):
    job = Job(RunConfig(), Path("out"), eval_tasks=3)
    click = typer.main.get_command(app)
    for stage, args in job.commands().items():
        command = click.commands[args[0]]
        assert args[0] == stage and command.make_context(stage, list(args[1:])).params

def test_results_take_the_last_row_of_each_kind(empty):
    job = Job(RunConfig(), Path("out"))
    job.run.mkdir(parents=True)
    at = dict(split="val", temperature=1.0)
    rows = [dict(at, mode="cold", acc_training_companies=.1, acc_heldout=.1), dict(at, mode="feedback", acc=.9), dict(at, mode="cold", acc_training_companies=.4, acc_heldout=None)]
    rows += [dict(at, mode="cold", temperature=0.0, acc_training_companies=.7), dict(at, mode="cold", split="test", acc_training_companies=.8)]
    (job.run / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert results([job]) == [dict(run="fg_replay-s0", seen=.4, heldout=None, after_feedback=.9)]

# The whole demo, with a stand-in for the trainer

STAND_IN = """
import sys, json
from pathlib import Path
from fg_dapo.evaluation.synthetic import synthetic_run
stage, arm, out = sys.argv[1:]
if stage == "train": synthetic_run(out, arm, steps=4)
"""

@pytest.fixture
def stand_in(empty, monkeypatch):
    "An empty folder with data and a model, and a trainer that invents its numbers."
    (empty / "data").mkdir()
    for f in (ROOT / "data").glob("*.json*"): (empty / "data" / f.name).write_bytes(f.read_bytes())
    model(empty / "data" / "tiny")
    def start(job, stage): return subprocess.Popen([sys.executable, "-c", STAND_IN, stage, job.config.arm, str(job.out)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    monkeypatch.setattr(demo, "start", start)
    return empty

def test_the_demo_from_start_to_report(stand_in):
    args = ["demo", "--config", ROOT / "experiments/configs/demo.yaml", "--steps", 4, "--jobs", 3]
    code, said = ask(*args)
    assert code == 0, said
    report = stand_in / "runs/demo/report/report.html"
    assert report.is_file() and "the report: runs/demo/report/report.html" in said
    rows = json.loads((stand_in / "runs/demo/report/metrics.json").read_text())
    assert sorted(rows) == ["dapo-s0", "dapo_replay-s0", "fg_replay-s0"]
    for arm in ("dapo", "dapo_replay", "fg_replay"): assert any(x.startswith(f"{arm}-s0 ") and "-  " not in x for x in said.splitlines())
    again = ask(*args)[1]
    assert again.count("train is done already") == 3 and "train finished" not in again

def test_a_seed_and_an_arm_of_its_own(stand_in):
    code, said = ask("demo", "--config", ROOT / "experiments/configs/demo.yaml", "--arms", "fg_plan", "--seed", 3, "--out", "runs/x", "--set", "train.rollouts=6")
    assert "fg_plan-s3: train" in said
    from fg_dapo.config import load_config
    c = load_config("runs/x/configs/fg_plan-s3.yaml")
    assert (c.arm, c.seed, c.train.rollouts) == ("fg_plan", 3, 6)
