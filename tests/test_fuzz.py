"""Files and settings, damaged at random: refused with the place, or taken and then playable; never a traceback, and nothing overwritten."""
import dataclasses, hashlib, json, os, random, re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from fg_dapo.agent.scripted import oracle, play
from fg_dapo.cli import app
from fg_dapo.config import ConfigError, RunConfig, check_config, dump, keys, load_config, merge
from fg_dapo.core import rng_for, write_json, write_jsonl
from fg_dapo.world.directory import CompanyDirectory
from fg_dapo.world.records import FILES, Task, World, load_world, save_world
from fg_dapo.world.validate import validate_files

ROOT = Path(__file__).resolve().parents[1]
KINDS = tuple(FILES)
VERSIONED = "world_version" in {f.name for f in dataclasses.fields(Task)} # Whether task rows carry the version of their world
DATA_CASES = 360
SETTING_CASES = 360
BATCHES = 12 # Cases are dealt out over as many tests

def ask(*args):
    "Exit status and everything printed."
    r = CliRunner().invoke(app, [str(a) for a in args])
    if r.exception and not isinstance(r.exception, SystemExit): raise r.exception
    return r.exit_code, r.output

def digest(*folders):
    "Names and bytes of all that is in some folders."
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")): found.update(str(path).encode() + (path.read_bytes() if path.is_file() else b"/"))
    return found.hexdigest()

def refusal(said):
    "The errors of a refusal, one a line."
    lines = said.strip().splitlines()
    assert lines and lines[0].startswith("error: "), said
    return [x.strip() for x in lines[1:]] if lines[0].endswith("things are wrong:") else [lines[0].removeprefix("error: ")]

# Data

@pytest.fixture(scope="module")
def few():
    "A world of twelve companies, of both kinds, with all their tasks."
    world = load_world(ROOT / "data")
    companies = [c for c in world.companies.values() if not c.heldout][:8] + [c for c in world.companies.values() if c.heldout][:4]
    kept = {c.id: c for c in companies}
    tasks = {split: tuple(t for t in some if t.company_id in kept) for split, some in world.tasks.items()}
    people = {t.user_id: world.users[t.user_id] for some in tasks.values() for t in some}
    assert all(tasks.values())
    return dataclasses.replace(world, companies=kept, users=people, tasks=tasks)

NASTY = (None, True, False, 0, -1, 3.0, float("nan"), float("inf"), 10**30, [], {}, [[[]]], "", " ", "no", "true", "7", "a\nb", "a\rb", "tab\there", "x;y=z", "a: b", "a/b", "../../etc/passwd", "\ud800", "\U0001f600", "é", "e\u0301",
    "٣", "１２３４", "\u200b", "\u202e", "\u2028", "\x00", "\x1b[31m", "\x85", "<|end|>", "<tool_call>", "x" * 5000, "null", "nan", "0", "{}", "$HOME", "~")

def holders(value):
    "Every container inside a row, with the keys or indices in it."
    todo, found = [value], []
    while todo:
        x = todo.pop()
        inside = list(x) if isinstance(x, dict) else list(range(len(x)))
        found += [(x, k) for k in inside]
        todo += [x[k] for k in inside if isinstance(x[k], (dict, list))]
    return found

def a_value(rows, rng):
    box, key = rng.choice(holders(rng.choice(rows)))
    box[key] = rng.choice(NASTY)

def a_harmless_value(rows, rng):
    "What a person might well change."
    row = rng.choice(rows)
    if "fields" in row: row["fields"].update(pin=f"{rng.randrange(10**4):04d}") if "pin" in row["fields"] else None
    elif "departments" in row: rng.choice(row["departments"])["description"] = rng.choice(["all about money", "Zoë's desk", "calls, day & night"])
    else: row["request"] += rng.choice([" Thank you.", " It is urgent!", " Déjà vu."])

def a_text(rows, rng):
    "A text, a little different."
    box, key = rng.choice([(b, k) for b, k in holders(rng.choice(rows)) if isinstance(b[k], str)])
    changes = [str.upper, str.lower, lambda t: t + " ", lambda t: " " + t, lambda t: t.replace(" ", "-"), lambda t: t.replace(" ", "\u00a0"), lambda t: t + ";", lambda t: t.replace("a", "\u0430"),
        lambda t: "".join(chr(0x660 + int(c)) if c in "0123456789" else c for c in t), lambda t: t[::-1], lambda t: t * 40, lambda t: t.replace("-", "/"), lambda t: t + "\u0301"]
    box[key] = rng.choice(changes)(box[key])

def a_type(rows, rng):
    "The same value as another type."
    box, key = rng.choice([(b, k) for b, k in holders(rng.choice(rows)) if not isinstance(b[k], (dict, list))])
    box[key] = rng.choice([str(box[key]), [box[key]], {"value": box[key]}, int(box[key]) if isinstance(box[key], bool) else str(box[key])])

def a_key_less(rows, rng):
    box, key = rng.choice([(b, k) for b, k in holders(rng.choice(rows)) if isinstance(b, dict)])
    del box[key]

def a_key_more(rows, rng):
    boxes = [b for b, _ in holders(rng.choice(rows)) if isinstance(b, dict)]
    rng.choice(boxes)[rng.choice(["surprise", "id", "Name", "", "pin ", "\ud800", "__class__"])] = rng.choice(NASTY)

def an_exchange(rows, rng):
    "One value of two rows, exchanged."
    a, b = rng.choice(rows), rng.choice(rows)
    key = rng.choice(sorted(set(a) & set(b)))
    a[key], b[key] = b[key], a[key]

def a_copied_row(rows, rng): rows.insert(rng.randrange(len(rows) + 1), json.loads(json.dumps(rng.choice(rows))))
def a_row_less(rows, rng): del rows[rng.randrange(len(rows))]
def another_order(rows, rng): rng.shuffle(rows)
def no_rows(rows, rng): rows.clear()

def deep(rows, rng):
    box, key = rng.choice(holders(rng.choice(rows)))
    for _ in range(rng.choice([5, 50, 400])): box[key] = [box[key]]

ROW_CHANGES = (a_value, a_value, a_value, a_harmless_value, a_harmless_value, a_text, a_text, a_type, a_key_less, a_key_more, an_exchange, a_copied_row, a_row_less, another_order, no_rows, deep)

def change_rows(path, rng):
    "Change rows, and write them as any JSON writer would."
    text, jsonl = path.read_text(encoding="utf-8"), path.suffix == ".jsonl"
    whole = None if jsonl else json.loads(text)
    rows = [json.loads(x) for x in text.split("\n") if x] if jsonl else whole if isinstance(whole, list) else next(v for v in whole.values() if isinstance(v, list))
    change = rng.choice(ROW_CHANGES)
    change(rows, rng)
    ascii_only = rng.random() < .5
    text = "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in rows) if jsonl else json.dumps(whole, indent=rng.choice([None, 1]), ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return change.__name__

def cut(data, rng): return data[:rng.randrange(len(data))]
def a_flipped_byte(data, rng): i = rng.randrange(len(data)); return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1:]
def an_inserted_byte(data, rng): i = rng.randrange(len(data)); return data[:i] + rng.choice([b"\x00", b"\xff", b"\xe9", b"\xe2\x80\xa8", b"\n", b'"', b"\xc2\x85", b"\r"]) + data[i:]
def a_mark(data, rng): return b"\xef\xbb\xbf" + data
def utf16(data, rng): return data.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32"]))
def windows_lines(data, rng): return data.replace(b"\n", b"\r\n")
def old_mac_lines(data, rng): return data.replace(b"\n", b"\r")
def blank_lines(data, rng): return data.replace(b"\n", b"\n\n", rng.randrange(1, 4))
def nothing(data, rng): return rng.choice([b"", b"\n", b"null", b"[]", b"{}", b"0", b'"text"', b"[null]", b"[[]]"])
def junk_behind(data, rng): return data + rng.choice([b"}", b"junk", b"\x00" * 100, b"[1]", b"{\"id\": 1}"])
def brackets(data, rng): return b"[" * rng.choice([10, 1000, 200_000])
def a_long_number(data, rng): return re.sub(rb"\d+", b"9" * 5000, data, count=1)
def a_repeated_key(data, rng):
    found = rng.choice(list(re.finditer(rb'"([a-z_0-9]+)": ("[^"]*"|\d+|true|false)', data)))
    return data[:found.start()] + found[0] + b", " + data[found.start():]

BYTE_CHANGES = (cut, a_flipped_byte, a_flipped_byte, an_inserted_byte, an_inserted_byte, a_mark, utf16, windows_lines, old_mac_lines, blank_lines, nothing, junk_behind, brackets, a_long_number, a_repeated_key, a_repeated_key)

def a_folder(paths, rng): path = rng.choice(paths); path.unlink(); path.mkdir()
def no_file(paths, rng): rng.choice(paths).unlink()
def a_pipe(paths, rng): path = rng.choice(paths); path.unlink(); os.mkfifo(path)
def a_dangling_link(paths, rng): path = rng.choice(paths); path.unlink(); path.symlink_to("nowhere")
def exchanged_files(paths, rng):
    a, b = rng.sample(paths, 2)
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)

FOLDER_CHANGES = (a_folder, no_file, a_pipe, a_dangling_link, exchanged_files, exchanged_files)

def rows_of(path):
    "The rows of a data file of either version."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl": return [json.loads(x) for x in text.splitlines()]
    whole = json.loads(text)
    return whole if isinstance(whole, list) else whole[dict(companies="companies", user_profiles="users")[path.stem]]

def as_version(folder, version):
    "The same files, as a version of the world writes them."
    for kind in ("companies", "users"):
        rows = rows_of(folder / FILES[kind])
        write_json(folder / FILES[kind], rows if version == 1 else {"version": version, "seed": 0, "kind": "standard", kind: rows})
    for split in ("train", "val", "test"):
        rows = [{k: v for k, v in row.items() if k != "world_version"} for row in rows_of(folder / FILES[split])]
        write_jsonl(folder / FILES[split], [row | dict(world_version=version) if version > 1 else row for row in rows])

def damage(folder, rng):
    "Change a folder of data in one way; what was done."
    paths = [folder / name for name in FILES.values()]
    level = rng.random()
    if level < .06:
        change = rng.choice(FOLDER_CHANGES)
        change(paths, rng)
        return change.__name__
    path = rng.choice(paths)
    if level < .66: return f"{change_rows(path, rng)} in {path.name}"
    change = rng.choice(BYTE_CHANGES)
    path.write_bytes(change(path.read_bytes(), rng))
    return f"{change.__name__} in {path.name}"

def solved_by_the_oracle(folder):
    "Share of the tasks of a folder that the oracle solves."
    world = load_world(folder)
    directory = CompanyDirectory(world.companies.values())
    scenarios = [s for split in world.tasks for s in world.scenarios(split)]
    return sum(play(oracle(s, rng_for(0)), s, directory).success for s in scenarios) / len(scenarios)

def placed(error, folder):
    "Whether an error names a file of the folder, and a row and a field where there is one."
    found = re.match(re.escape(f"{folder}/") + r"(\w+\.jsonl?)(:\d+|: item \d+)?: \S", error)
    return bool(found) and found[1] in FILES.values()

@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_data_are_refused_with_their_place_or_playable(batch, few, tmp_path):
    taken, refused = [], []
    for case in range(batch, DATA_CASES, BATCHES):
        rng, folder = rng_for(0, "data", case), tmp_path / f"d{case}"
        save_world(few, folder)
        as_version(folder, 2 if VERSIONED and case // BATCHES % 2 else 1)
        what = damage(folder, rng)
        before = digest(folder)
        code, said = ask("validate", "--data", folder)
        assert code in (0, 1) and "Traceback" not in said and "defect" not in said, (case, what, said[-400:])
        if code:
            refused.append(what)
            for error in refusal(said): assert placed(error, folder), (case, what, error)
            wrong = ask("train", "--set", f"data.folder={folder}", "--set", "policy.checkpoint=none", "--out", tmp_path / "run")
            assert wrong[0] == 1 and str(folder) in wrong[1] and "defect" not in wrong[1], (case, what, wrong[1][-400:])
            assert not (tmp_path / "run").exists()
        else:
            taken.append(what)
            assert solved_by_the_oracle(folder) == 1, (case, what)
        assert digest(folder) == before, (case, what)
    assert taken and len(refused) > len(taken)

def test_changes_that_change_nothing_are_taken(few, tmp_path):
    save_world(few, tmp_path)
    for change in (windows_lines, blank_lines):
        for name in FILES.values(): (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes(), random.Random(0)))
        assert ask("validate", "--data", tmp_path)[0] == 0 and solved_by_the_oracle(tmp_path) == 1

# Settings

WORDS = ("~", "null", "", "true", "no", "on", "off", "0", "-1", "1", "2", "010", "0x10", "0o10", "1:30", "1_000", "1e400", "1e-300", "1e9", ".nan", ".inf", "-.inf", "9" * 60, "'8'", "3.5", "1.0", "[1]", "[[1], {a: b}]", "{a: 1}", "{}", "[]",
    "*a", "&a 1", "&a [*a]", "!!python/object:os.system x", "!!int '3'", "!x 1", "'\\0'", '"\\0"', '"\\ud800"', '"\\u2028"', "- 1", "a: b: c", "[1", "{", "|", "> x", "%YAML 1.1", "@x", "`x`", "$NO_SUCH_NAME/x", "$HOME", "~/x", "~nobody-here/x", "2026-01-31",
    "compact", "hermes", "verl", "local", "none", "replay", "strip", "gated", "shaped", "cold", "muon", "full", "hint", "shuffled", "empty", "cuda", "x" * 3000, "é", "\ud800", "\x00", "\x1b[31m", "\u2028", "0.5", "0.3", "4", "16", "64", "1e-3")
LEAVES = sorted(keys())

def a_likely_override(rng):
    "One `key=value` that a person might well write; not all of them go together."
    key = rng.choice(LEAVES)
    section, _, name = key.rpartition(".")
    holder = RunConfig()
    for part in section.split(".") if section else []: holder = getattr(holder, part)
    value, options = getattr(holder, name), [x for x in get_args(type(holder).model_fields[name].annotation) if isinstance(x, str)]
    if options: return f"{key}={rng.choice(options)}"
    if isinstance(value, bool): return f"{key}={rng.choice(['true', 'false'])}"
    if isinstance(value, int): return f"{key}={rng.choice([1, 2, 3, 4, 8, 16, 100, 600])}"
    if isinstance(value, float): return f"{key}={rng.choice([.05, .1, .3, .5, 1.0, 2.0, 1e-3])}"
    return f"{key}={dict(wave_sizes='[1]', log='[jsonl]', arm='mine').get(name, 'null' if value is None else value)}"

def an_override(rng):
    "One `key=value`, mostly of a key that is there."
    if rng.random() < .5: return a_likely_override(rng)
    key = rng.choice(LEAVES)
    odd = [key.rpartition(".")[2], key.rpartition(".")[0], key + ".x", key.upper(), key[:-1], f" {key} ", key.replace(".", ".."), "", ".", "x" * 500, "é", "\ud800", "train", "<<"]
    key = key if rng.random() < .85 else rng.choice(odd)
    return f"{key}={rng.choice(WORDS)}" if rng.random() < .97 else key

def new_value(lines, rng):
    i = rng.choice([i for i, x in enumerate(lines) if re.search(r": \S", x)])
    lines[i] = lines[i].partition(":")[0] + ": " + rng.choice(WORDS)

def another_line(lines, rng):
    odd = ["train.steps: 3", "\tx: 1", "? [a, b]", "- x", "<<: *base", "<<: {seed: 1}", "<<: 3", "seed: 1", "surprise: 1", "---", "...", "%TAG ! x", "1: 2", "null: 1", "{a: 1}: 2", "'': 1", "a: &a {b: *a}",
        "x: " + "[" * 50_000, "x: " + "{a: " * 300, "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d]"]
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(odd))

def a_line_less(lines, rng): del lines[rng.randrange(len(lines))]
def a_line_twice(lines, rng): i = rng.randrange(len(lines)); lines.insert(i, lines[i])
def a_line_moved(lines, rng): lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))
def another_indent(lines, rng): i = rng.randrange(len(lines)); lines[i] = " " * rng.randrange(1, 9) + lines[i]
def a_new_comment(lines, rng): i = rng.randrange(len(lines)); lines[i] += " # é \U0001f600"

LINE_CHANGES = (new_value, new_value, new_value, new_value, another_line, another_line, a_line_less, a_line_twice, a_line_moved, another_indent, a_new_comment)
TEXT_CHANGES = (cut, a_flipped_byte, an_inserted_byte, a_mark, utf16, windows_lines, nothing, brackets, a_long_number)

def damaged_settings(path, rng):
    "Write a file of settings with one change; what was done."
    base = dump(load_config(ROOT / "experiments/configs" / rng.choice(["tiny_fg_replay.yaml", "tiny_dapo.yaml", "verl_cpu.yaml"])), comments=rng.random() < .3)
    if rng.random() < .75:
        lines, change = base.splitlines(), rng.choice(LINE_CHANGES)
        change(lines, rng)
        path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    else:
        change = rng.choice(TEXT_CHANGES)
        path.write_bytes(change(base.encode(), rng))
    return change.__name__

def start(config, policy, folder, out):
    "Make all that a run is made of; for verl, what it is told."
    if config.engine == "verl":
        from fg_dapo.engines.verl_config import as_arguments, overrides
        return as_arguments(overrides(config, out))
    from fg_dapo.engines.local import Trainer
    threads = dict(train=dict(threads=1)) # The machine's own business
    mine = dict(policy=dict(checkpoint=str(policy), chat="compact"), data=dict(folder=str(folder)), algorithm=dict(feedback_guidance=dict(use_llm_enhancement=False)))
    return Trainer(check_config(merge(merge(config.model_dump(mode="json"), threads), mine)), out)

@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    "A run's folder with something in it."
    folder = tmp_path_factory.mktemp("old") / "run"
    write_json(folder / "manifest.json", dict(config=RunConfig().model_dump(mode="json"), seed=0))
    write_jsonl(folder / "metrics.jsonl", [dict(step=1)])
    return folder

@pytest.fixture(scope="module")
def little(few, tmp_path_factory):
    "The folder of a small world."
    folder = tmp_path_factory.mktemp("little")
    save_world(few, folder)
    return folder

@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_settings_are_refused_with_their_place_or_start_a_run(batch, raw_policy, little, old_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    taken = refused = 0
    for case in range(batch, SETTING_CASES, BATCHES):
        rng, path = rng_for(0, "settings", case), tmp_path / f"s{case}.yaml"
        what, options = "overrides", []
        if case // BATCHES % 2: what, options = damaged_settings(path, rng), ["--config", path]
        else: path.write_text("seed: 0\n")
        given = [an_override(rng) for _ in range(rng.choice([0, 1]) if options else rng.choice([1, 1, 2, 3]))]
        options += [x for o in given for x in ("--set", o)]
        before = digest(little, old_run), path.read_bytes()
        code, said = ask("config", "--no-comments", *options)
        assert code in (0, 1) and "Traceback" not in said and "defect" not in said, (case, what, given, said[-400:])
        if code:
            refused += 1
            for error in refusal(said): assert re.match(r"override '|override \"|" + re.escape(str(path)) + r"(:\d+)?: \S", error), (case, what, given, error)
        else:
            taken += 1
            config = load_config(path if "--config" in options else None, given)
            (tmp_path / "again.yaml").write_text(said, encoding="utf-8")
            assert load_config(tmp_path / "again.yaml") == config, (case, what, given)
            try: start(config, raw_policy, little, tmp_path / f"run{case}")
            except Exception as e: raise AssertionError((case, what, given)) from e
        if case % 4 == 0:
            code, said = ask("train", *options, "--set", f"data.folder={little}", "--set", "policy.checkpoint=none", "--out", old_run)
            assert code == 1 and "defect" not in said, (case, what, given, said[-400:])
        assert (digest(little, old_run), path.read_bytes()) == before, (case, what, given)
    assert refused and taken

@pytest.mark.parametrize("case", range(4))
def test_what_was_taken_trains(case, raw_policy, few, tmp_path):
    "Data and settings that pass, after changes that may pass, really train a step."
    folder = tmp_path / "data"
    for attempt in range(100):
        rng = rng_for(1, "train", case, attempt)
        save_world(few, folder)
        for name in FILES.values():
            if rng.random() < .5: (folder / name).write_bytes(windows_lines((folder / name).read_bytes(), rng))
        for kind in rng.sample(KINDS, 3): change_rows(folder / FILES[kind], rng)
        fine = not validate_files(folder / FILES["companies"], folder / FILES["users"], [folder / FILES[s] for s in ("train", "val", "test")])
        if fine: break
    assert fine
    for attempt in range(100):
        likely = [a_likely_override(rng_for(2, "train", case, attempt, n)) for n in range(4)]
        if any(x.startswith(("engine", "train.log", "algorithm.feedback_guidance.use_llm")) for x in likely): continue
        try: load_config(None, [*likely, f"algorithm.transfer.mode={('replay', 'none', 'shaped', 'gated')[case]}"])
        except ConfigError: continue
        break
    small = [*likely, "train.steps=1", "train.tasks_per_step=2", "train.rollouts=4", "train.eval_every=1", "train.eval_tasks=2", "train.threads=1", "limits.max_new_tokens=12", "limits.tool_calls=3", "algorithm.transfer.updates=1", "algorithm.transfer.rows=4",
        f"algorithm.transfer.mode={('replay', 'none', 'shaped', 'gated')[case]}", f"train.temperature={rng.choice([0.05, 0.5, 20])}", f"seed={rng.choice([0, 2**32 - 1])}", f"algorithm.feedback_guidance.content={rng.choice(['real', 'shuffled', 'foreign', 'empty'])}"]
    options = [x for s in [*small, f"data.folder={folder}", f"policy.checkpoint={raw_policy}"] for x in ("--set", s)]
    before = digest(folder)
    code, said = ask("train", *options, "--out", tmp_path / "run")
    assert code == 0 and "done: " in said, said[-600:]
    assert digest(folder) == before and json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["step"] == 1

# Kinds of wrong data, one by one

def write_rows(path, rows):
    if path.suffix == ".jsonl": return path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(rows if isinstance(whole, list) else {k: rows if isinstance(v, list) else v for k, v in whole.items()}), encoding="utf-8")

def put(*at):
    "Put the last argument where the others lead."
    *keys, value = at
    def change(rows):
        box = rows
        for key in keys[:-1]: box = box[key]
        box[keys[-1]] = value(box[keys[-1]]) if callable(value) else value
    return change

def renamed(form):
    "The third company is called as the first, in another form."
    return lambda rows: rows[2].update(name=form(rows[0]["name"]))

KINDS_OF_WRONG = [ # File, change, the place and the field that the error names, words of it
    ("train", put(2, "heldout", "no"), ":3: heldout: ", "valid boolean"),
    ("train", put(2, "level", True), ":3: level: ", "valid integer"),
    ("train", put(2, "level", 3.0), ":3: level: ", "valid integer"),
    ("train", put(2, "level", "3"), ":3: level: ", "valid integer"),
    ("companies", put(2, "heldout", 0), ": item 2: heldout: ", "valid boolean"),
    ("companies", renamed(str.upper), ": item 2: name: ", "too much like another"),
    ("companies", renamed(lambda n: n.replace(" ", "-")), ": item 2: name: ", "too much like another"),
    ("companies", renamed(lambda n: n.replace(" ", "")), ": item 2: name: ", "too much like another"),
    ("companies", renamed(lambda n: n + "."), ": item 2: name: ", "too much like another"),
    ("companies", renamed(lambda n: n.replace("e", "è")), ": item 2: name: ", "too much like another"),
    ("companies", renamed(lambda n: n.replace("e", "\u0435")), ": item 2: name: ", "look alike"),
    ("companies", put(2, "name", "Cafe\u0301 Bank"), ": item 2: name: ", "composed form"),
    ("companies", put(2, "name", "Acme\u200bBank"), ": item 2: name: ", "U+200B (ZERO WIDTH SPACE)"),
    ("companies", put(2, "name", "Acme; Bank"), ": item 2: name: ", "';'"),
    ("companies", put(2, "name", "Acme = Bank"), ": item 2: name: ", "'='"),
    ("companies", put(2, "name", "..."), ": item 2: name: ", "no letter"),
    ("companies", put(2, "name", "A" * 61), ": item 2: name: ", "at most 60"),
    ("companies", put(2, "departments", 0, "phone", "212-555-01\u0664\u0662"), ": item 2: departments.0.phone: ", "a digit that is not 0 to 9"),
    ("companies", put(2, "departments", 0, "description", "x" * 121), ": item 2: departments.0.description: ", "1 to 120"),
    ("companies", put(2, "departments", 0, "description", "two\nlines"), ": item 2: departments.0.description: ", "U+000A"),
    ("companies", put(2, "routing", 0, "request_type", "fly/away"), ": item 2: routing.0.request_type: ", "small letters"),
    ("users", put(2, "fields", "pin", "\uff11\uff12\uff13\uff14"), ": item 2: fields.pin: ", "a digit that is not 0 to 9"),
    ("users", put(2, "fields", "pin", 1234), ": item 2: fields.pin: ", "valid string"),
    ("users", put(2, "fields", "security_word", "red;pin=1"), ": item 2: fields.security_word: ", "one word"),
    ("users", put(2, "fields", "security_word", "red\npin"), ": item 2: fields.security_word: ", "U+000A"),
    ("users", put(2, "fields", "email", "a=b@example.com"), ": item 2: fields.email: ", "example.com"),
    ("users", put(2, "fields", "full_name", "Ann=Bo Example"), ": item 2: fields.full_name: ", "a first name"),
    ("users", put(2, "fields", "full_name", "\ud800 Example"), ": item 2: fields.full_name: ", "half a surrogate"),
    *((kind, put(2, "id", bad), place, "letters, digits, dots") for kind, place in (("companies", ": item 2: id: "), ("users", ": item 2: id: "), ("train", ":3: id: ")) for bad in ("a:b", "a/b", "../x", "", " a", "a b", "-a", "x" * 65)),
    ("val", put(0, "id", "val\x000"), ":1: id: ", "U+0000"),
    ("train", put(2, "request", lambda t: t + " please" * 60), ":3: request: ", "at most 300"),
    ("train", put(2, "request", lambda t: t + "\u2028"), ":3: request: ", "U+2028 (LINE SEPARATOR)"),
    ("train", put(2, "request", lambda t: t + "\x85"), ":3: request: ", "U+0085"),
    ("train", put(2, "request", lambda t: "<|act|>" + t), ":3: request: ", "special token"),
    ("train", put(2, "request", lambda t: t + " "), ":3: request: ", "begins or ends with a space"),
    ("train", put(2, "split", "test"), ":3: split: ", "holds the train tasks"),
    ("train", lambda rows: rows.append(dict(rows[2])), ":3", "is also at"),
    ("train", lambda rows: rows[3].update(id=rows[2]["id"].upper()), ":4: id: ", "is also at"),
    ("train", put(2, "company_id", "c-none"), ":3: company_id: ", "no company 'c-none'"),
    ("train", put(2, "user_id", "u-none"), ":3: user_id: ", "no user 'u-none'"),
    ("test", lambda rows: rows.clear(), ": ", "holds nothing"),
    ("users", lambda rows: rows.clear(), ": ", "holds nothing"),
]

@pytest.mark.parametrize("kind, change, place, words", KINDS_OF_WRONG, ids=[f"{k}-{p.strip(': ')}-{i}" for i, (k, _, p, _) in enumerate(KINDS_OF_WRONG)])
def test_a_kind_of_wrong_data_is_named(kind, change, place, words, few, tmp_path):
    save_world(few, tmp_path)
    rows = rows_of(tmp_path / FILES[kind])
    change(rows)
    write_rows(tmp_path / FILES[kind], rows)
    code, said = ask("validate", "--data", tmp_path)
    found = refusal(said)
    mine = [e for e in found if e.startswith(f"{tmp_path / FILES[kind]}{place}") and words in e]
    assert code == 1 and (mine or place == ":3" and words in said), found[:5]

@pytest.mark.parametrize("text, words", [
    ('{"id": "a", "id": "b"}', ":1: id: the key is there twice; keep one"),
    ('{"a": {"b": [{"c": 1, "c": 1}]}}', ":1: a.b.0.c: the key is there twice; keep one"),
    ("[" * 100_000, ": nested too deeply"), ('{"id": ' + "[" * 60 + "]" * 60 + "}", ":1: id: nested too deeply"),
    ("NaN", ":1: row: "), ("{", ":1: not JSON"), ("1" * 5000, ":1: not JSON"), ("", ": holds nothing"),
])
def test_wrong_json_is_named(text, words, few, tmp_path):
    save_world(few, tmp_path)
    (tmp_path / FILES["val"]).write_text(text)
    assert any(words in e for e in validate_files(tmp_path / FILES["companies"], tmp_path / FILES["users"], [tmp_path / FILES["val"]]))

@pytest.mark.parametrize("data, words", [(b"\xff\xfe[\x00]\x00", ":1: is UTF-16"), (b"\xef\xbb\xbf[]", ":1: begins with a byte order mark"), (b'[\n"caf\xe9"]', ":2: byte 0xe9 is not UTF-8"), (b"", ": holds nothing")])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_are_named(kind, data, words, few, tmp_path):
    save_world(few, tmp_path)
    (tmp_path / FILES[kind]).write_bytes(data)
    code, said = ask("validate", "--data", tmp_path)
    assert code == 1 and f"{tmp_path / FILES[kind]}{words}" in said

def test_files_of_other_splits_and_of_other_worlds_are_refused(few, tmp_path):
    save_world(few, tmp_path)
    train, test = tmp_path / FILES["train"], tmp_path / FILES["test"]
    bytes_of_train = train.read_bytes()
    train.write_bytes(test.read_bytes())
    test.write_bytes(bytes_of_train)
    found = refusal(ask("train", "--set", f"data.folder={tmp_path}", "--out", tmp_path / "run")[1])
    assert f"{train}:1: split: 'test', but train_tasks.jsonl holds the train tasks" in found and not (tmp_path / "run").exists()
    assert re.fullmatch(r"and \d+ more; fg-dapo validate --data .* lists them all", found[20]) and len(found) in (21, 22)
    save_world(few, tmp_path)
    as_version(tmp_path, 1)
    users = tmp_path / FILES["users"]
    write_json(users, dict(version=2, seed=3, kind="standard", users=rows_of(users)))
    said = ask("validate", "--data", tmp_path)[1]
    assert f"{users}: version: is 2, but that of {tmp_path / FILES['companies']} is 1" in said

@pytest.mark.parametrize("head, words", [(dict(version=3), "version: expected 1 or 2, got 3"), (dict(version="2"), "version: expected 1 or 2, got '2'"), (dict(version=True), "version: expected"), (dict(), "version: expected 1 or 2, got None"),
    (dict(version=2, sed=1), "'sed': unknown key"), (dict(version=2, seed=-1), "seed: expected a whole number"), (dict(version=2, kind=3), "kind: expected")])
def test_a_wrong_head_is_named(head, words, few, tmp_path):
    save_world(few, tmp_path)
    path = tmp_path / FILES["companies"]
    write_json(path, head | dict(companies=rows_of(path)))
    assert any(e.startswith(f"{path}: ") and words in e for e in validate_files(path))

def test_errors_come_in_the_order_of_files_and_rows(few, tmp_path):
    save_world(few, tmp_path)
    for kind in KINDS:
        rows = rows_of(tmp_path / FILES[kind])
        for i in (11, 2, 9): rows[i]["id"] = "a:b"
        write_rows(tmp_path / FILES[kind], rows)
    found = refusal(ask("validate", "--data", tmp_path)[1])
    places = [(list(FILES.values()).index(m[1]), int(m[2])) for e in found if (m := re.search(r"(\w+\.jsonl?)(?::|: item )(\d+): ", e))]
    assert len(places) == len(found) and places == sorted(places) and len({f for f, _ in places}) == 5

def test_the_same_bytes_are_checked_once(few, tmp_path, monkeypatch):
    import fg_dapo.world.validate as v
    save_world(few, tmp_path)
    calls = []
    real = v.validate_files
    monkeypatch.setattr(v, "validate_files", lambda *a: calls.append(1) or real(*a))
    for _ in range(3): v.check_folder(tmp_path)
    assert len(calls) == 1
    path = tmp_path / FILES["val"]
    path.write_text(path.read_text().replace('"level": ', '"level": 9', 1))
    for _ in range(2):
        with pytest.raises(v.DataError, match="level"): v.check_folder(tmp_path)
    assert len(calls) == 3
