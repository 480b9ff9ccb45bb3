"The world: same bytes from the same seed, honest splits, synthetic people, and a validator that misses nothing."
import copy, dataclasses, hashlib, itertools, json, os, re, subprocess, sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from fg_dapo.core import read_json, read_jsonl, rng_for, write_json, write_jsonl
from fg_dapo.world.directory import CompanyDirectory, CompanyInfo, DepartmentInfo
from fg_dapo.world.generate import (ALTERNATIVES, INDUSTRIES, REQUESTS, REQUIREMENTS, TEST_CARDS, department_phones, generate_world, make_task, revealed, rule_solves, rules_ceiling, ruled_company, seen_scenarios, majorities, told_ceiling, told_chance,
    drawn_rules, level_of, odd_fields, rules_of, GUESSED_FIRST, KINDS, odd_path, random_company, random_scenario, random_user, request_text, rule_path)
from fg_dapo.world.records import AUTH_FIELDS, BEHAVIORS, DEPARTMENTS, FILES, TOLERANCE, VERSIONS, Company, DataError, Department, RoutingRule, Scenario, Task, UserProfile, World, load_world, save_world, solve
from fg_dapo.world.phone import AuthResult, PhoneSystemSimulator
from fg_dapo.world.user import UserSimulator, fields_in, known_field, said_missing
from fg_dapo.world.validate import main, validate_files

from fg_dapo.world import generate as worlds

def generate_world(seed, kind="standard", version=2):
    "A world, of version 2 where nothing else is said."
    return worlds.generate_world(seed, kind, version)

def drawn_rules(seed, kind="standard", version=2): return worlds.drawn_rules(seed, kind, version)

DATA = Path(__file__).parents[1] / "data"
SEEDS = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None, derandomize=True)

@pytest.fixture(scope="module", params=range(6))
def world(request): return generate_world(request.param)

@pytest.fixture(scope="module")
def world0(): return generate_world(0)

@pytest.fixture(scope="module")
def directory(world0): return CompanyDirectory(world0.companies.values())

# Bytes

def sums(folder): return {k: hashlib.sha256((Path(folder) / f).read_bytes()).hexdigest() for k, f in FILES.items()}

def test_same_seed_same_bytes_in_any_process(tmp_path):
    code = "import sys; from fg_dapo.world.generate import generate_world; from fg_dapo.world.records import save_world; save_world(generate_world(int(sys.argv[1])), sys.argv[2])"
    runs = {}
    for name, seed, hashseed in ("a", 0, "1"), ("b", 0, "77"), ("c", 1, "1"):
        env = os.environ | dict(PYTHONHASHSEED=hashseed, PYTHONPATH=str(DATA.parent))
        subprocess.run([sys.executable, "-c", code, str(seed), str(tmp_path / name)], check=True, env=env)
        runs[name] = sums(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"] == sums(DATA), "the data in the repository are not what generate_world(0) writes"
    assert all(runs["a"][k] != runs["c"][k] for k in FILES)

def test_data_load_as_generated(world0):
    assert load_world(DATA) == worlds.generate_world(0) and load_world(DATA).version == 1
    assert (world0.version, world0.seed, world0.kind) == (2, 0, "standard")

VERSION_1 = dict(companies="882529e034664ffa23822fa2f1f560d6699564e7b31e005b8e7c7f45260fe919", users="e6972fd7257bf70e2b41a9f785ea5011a0cf963b77b5a67cc4d1db53c298e4fd", train="c07af1db5dcb7e683abf4b3c182296244277f9cfad84add7c06e1d36ef062fe4", val="9470b388b9339030948c9eaacc75e7d6c93d4f2d96b8501162f76ede2651d07a", test="ba88a8ad993f536e28c7e1943802ac94c57f747cc723c3e1bd9bb9c2c5ec9d98") # Of the files that version 1 of seed 0 had

def test_version_1_is_written_as_it_always_was(tmp_path):
    old = generate_world(0, version=1)
    save_world(old, tmp_path)
    assert sums(tmp_path) == VERSION_1
    again = load_world(tmp_path)
    assert again == old and again.version == 1 and isinstance(read_json(tmp_path / FILES["companies"]), list)

@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_version_comes_back_from_its_files(tmp_path, version, kind):
    w = generate_world(7, kind, version)
    save_world(w, tmp_path)
    again = load_world(tmp_path)
    assert again == w and again.version == version and {t.world_version for ts in again.tasks.values() for t in ts} == {version}
    assert again.scenarios("val")[0].task.world_version == version

def test_versions_that_disagree_are_refused(tmp_path, world0):
    files = save_world(world0, tmp_path)
    head = read_json(files["companies"])
    for change, words in ((dict(version=1), "version"), (dict(version=3), "version: is 3"), (dict(seed="x"), "seed"), (dict(kind=7), "kind"), (dict(shoe=1), "shoe: not known"), (dict(seed=9), "differ")):
        write_json(files["companies"], head | change)
        with pytest.raises(DataError, match=words): load_world(tmp_path)
    write_json(files["companies"], head["companies"]) # A bare list is version 1
    with pytest.raises(DataError, match="world_version: is 2"): load_world(tmp_path)
    with pytest.raises(ValueError, match="no world version 3"): generate_world(0, version=3)
    mixed = {"train": world0.tasks["train"], "val": tuple(dataclasses.replace(t, world_version=1) for t in world0.tasks["val"])}
    with pytest.raises(ValueError, match="versions 1 and 2"): World(world0.companies, world0.users, mixed).version

# Rules

@quick
@given(SEEDS)
def test_no_rule_is_common_sense(seed):
    rules, old = drawn_rules(seed), KINDS["standard"]
    for (industry, d), fields in rules.requirements.items():
        assert len(fields) == len(old.requirements[industry, d]) and set(fields) <= set(old.plausible[industry])
        assert not set(fields) <= set(GUESSED_FIRST[industry])
        swaps = rules.alternatives.get((industry, d), {})
        assert len(swaps) == len(old.alternatives.get((industry, d), {})) and all(f in fields and g not in fields for f, g in swaps.items())

def test_rules_are_those_of_the_seed():
    assert drawn_rules(3) == drawn_rules(3) != drawn_rules(4) and rules_of(generate_world(3)) == drawn_rules(3)
    assert rules_of(generate_world(3, version=1)) is KINDS["standard"] and rules_of(generate_world(3, "easy")) is KINDS["easy"]
    w = generate_world(3)
    with pytest.raises(ValueError, match="seed is not known"): rules_of(World(w.companies, w.users, w.tasks))

# Phone

def small_scene(version=2, lacks=()):
    billing = Department("Billing", "512-555-0137", "Bills", ("account_number", "pin"), {"pin": "security_word"})
    service = Department("Customer Service", "646-555-0143", "General questions", ("full_name",))
    harbor = Company("c000", "Harbor Bank", "bank", False, (service, billing), (RoutingRule("dispute_charge", "Billing", ("Customer Service",)),))
    values = dict(full_name="Ana Example", account_number="TEST-4402", pin="7313", security_word="maple", zip_code="00012")
    ana = UserProfile("u000", {f: v for f, v in values.items() if f not in lacks}, "cooperative")
    truth = solve(harbor, ana, "dispute_charge")
    return Scenario(Task("t0", "train", 3, "c000", "Harbor Bank", "u000", "dispute_charge", "I want to dispute a charge at Harbor Bank.", False, truth, version), harbor, ana)

@pytest.mark.parametrize("info", [{}, dict(zip_code="00012"), dict(pin="0000"), dict(security_word="oak", zip_code="00012"), dict(account_number="", pin=" "), dict(full_name="Ana Example")])
def test_a_stranger_hears_the_same_whatever_is_wanted(info):
    said = set()
    for seed in range(12):
        phone = PhoneSystemSimulator(small_scene(), seed)
        call = phone.handle_call("512-555-0137", info)
        assert call.stage == "authentication" and call.auth == AuthResult(silent=True) and not call.auth.ok
        assert fields_in(call.text) == () and not any(d in call.text for d in DEPARTMENTS)
        said.add(call.text)
    assert len(said) > 1
    assert PhoneSystemSimulator(small_scene(1)).handle_call("512-555-0137", {}).auth.missing == ("account_number", "pin") # As it was

@pytest.mark.parametrize("info, verified, missing, wrong, offered", [
    (dict(account_number="test-4402 "), ("account_number",), ("pin",), (), {"pin": "security_word"}),
    (dict(security_word="Maple"), ("security_word",), ("account_number",), (), {}),
    (dict(pin="7313", account_number="TEST-0000"), ("pin",), (), ("account_number",), {}),
    (dict(account_number="TEST-4402", pin="0000", security_word="maple"), ("account_number", "security_word"), (), (), {}),
    (dict(account_number="TEST-4402", pin=""), ("account_number",), ("pin",), (), {"pin": "security_word"})])
def test_whoever_matches_a_field_hears_the_rest(info, verified, missing, wrong, offered):
    auth = PhoneSystemSimulator(small_scene()).handle_call("512-555-0137", info).auth
    assert (auth.verified, auth.missing, auth.wrong, auth.offered, auth.silent) == (verified, missing, wrong, offered, False)

NUMBERS = ("512-555-0137", "(512) 555-0137", "+1-512-555-0137", "1 512 555 0137", "512.555.0137", "5125550137", "512\u2011555\u20110137", "512\u2013555 \u2212 0137", " 512/555/0137 ",
    "tel:+15125550137", "001 512 555 0137", "\uff15\uff11\uff12-555-0137", "\u0665\u0661\u0662-555-0137", "512-555-0136", "555-0137", "512-555-01377", "", "call me", "\u00b2512-555-0137", "+44 512 555 0137", "0137-555-512")

@pytest.mark.parametrize("number", NUMBERS, ids=ascii)
def test_the_phone_and_the_directory_know_the_same_numbers(number):
    scene = small_scene()
    directory = CompanyDirectory([scene.company])
    try: known = directory.lookup_phone(number).name
    except KeyError: known = None
    assert PhoneSystemSimulator(scene).handle_call(number, {}).department == known
    assert (known == "Billing") == (number in NUMBERS[:13] or number == "\u00b2512-555-0137")

# Names of fields

NAMED = {"telephone": "phone_number", "account #": "account_number", "Acct. No.": "account_number", "last 4 of your social": "last_4_ssn", "SSN": "last_4_ssn", "DOB": "date_of_birth", "birthday": "date_of_birth",
    "e-mail": "email", "E-Mail address": "email", "ZIP": "zip_code", "zipcode": "zip_code", "PIN": "pin", "PIN #": "pin", "phone number": "phone_number", "cell": "phone_number", "mailing address": "address",
    "card number": "credit_card_last4", "last four of your card": "credit_card_last4", "policy #": "policy_number", "password": "security_word", "name": "full_name", "Full Name": "full_name"}

@pytest.mark.parametrize("name", NAMED)
def test_everybody_understands_the_same_names(name):
    field = NAMED[name]
    assert known_field(name) == field and fields_in(f"What is your {name}, please?") == (field,) and said_missing(f"I am sorry, your {name} is missing.") == (field,)

@quick
@given(st.lists(st.sampled_from(list(AUTH_FIELDS)), min_size=1, unique=True))
def test_lists_of_registry_names_are_read_in_full(fields):
    assert set(fields_in(f"What is your {', '.join(fields)}?")) == set(fields)
    assert set(said_missing(f"tell {', '.join(fields)} are missing")) == set(fields)

@pytest.mark.parametrize("text", ["Thank you for your ZIP code.", "All done, your request is completed. Thank you for your ZIP code.", "Is your ZIP code missing?", "Your ZIP code is not missing.",
    "Nothing is missing, thank you for the ZIP code.", "tell zip_code", "Your ZIP code isn't missing.", "I do not have to ask for your ZIP code.", "ZIP code, PIN, email", ""])
def test_a_mention_says_not_that_something_is_missing(text): assert said_missing(text) == ()

@pytest.mark.parametrize("text", ["tell zip_code is missing", "I am sorry, you don't have a ZIP code.", "They want a ZIP code and you do not have one.", "You have no zip code.", "No ZIP code is available.",
    "I have your PIN, but the ZIP code is missing.", "Your PIN is fine. The ZIP code is unavailable!", "you don\u2019t have the postal code", "They need the ZIP, which you lack.", "The ZIP code is not available."])
def test_a_sentence_says_that_something_is_missing(text): assert said_missing(text) == ("zip_code",)

# Companies

def test_companies(world):
    cs = list(world.companies.values())
    assert Counter((c.industry, c.heldout) for c in cs) == {(i, h): n for i in INDUSTRIES for h, n in ((False, 20), (True, 5))}
    assert len({c.name.split()[0] for c in cs}) == len(cs) and all(len(c.name.split()) == 2 for c in cs)
    phones = [d.phone for c in cs for d in c.departments]
    assert len(set(phones)) == len(phones) and all(re.fullmatch(r"\d{3}-555-01\d\d", p) for p in phones)
    assert {len(c.departments) for c in cs} == {2, 3, 4, 5}
    for c in cs:
        names = [d.name for d in c.departments]
        assert names[0] == "Customer Service" and len(set(names)) == len(names)
        assert all(set(r.path) <= set(names) and len(set(r.path)) == len(r.path) for r in c.routing)
        assert {r.request_type for r in c.routing} == {k for k, r in REQUESTS.items() if r.path_for(c.industry)}
        for d in c.departments: assert all(f in d.auth_fields and g not in d.auth_fields for f, g in d.alternatives.items())

def test_companies_follow_rules_with_few_exceptions(world):
    cs = list(world.companies.values())
    deps = [(c.industry, d) for c in cs for d in c.departments]
    requirements = rules_of(world).requirements
    odd = sum(d.auth_fields != requirements[i, d.name] for i, d in deps) / len(deps)
    assert 0.08 < odd < 0.22
    assert 0.3 < sum(bool(d.alternatives) for _, d in deps) / len(deps) < 0.55
    rules = [(r.path, rule_path(r.request_type, c.industry, tuple(d.name for d in c.departments))) for c in cs for r in c.routing]
    assert 0.01 < sum(got[-1] != rule[-1] for got, rule in rules) / len(rules) < 0.08
    assert 0.08 < sum(got != rule for got, rule in rules) / len(rules) < 0.25
    assert {len(got) for got, _ in rules} == {1, 2, 3, 4}

def test_rules_have_no_giant_and_cover_sizes():
    sizes = {k: len(v) for k, v in REQUIREMENTS.items()}
    assert set(sizes.values()) == {1, 2, 3, 4, 5} and len(sizes) == 20
    assert max(n for (_, d), n in sizes.items() if d == "Customer Service") <= 2
    assert all(f in REQUIREMENTS[k] and g not in REQUIREMENTS[k] for k, a in ALTERNATIVES.items() for f, g in a.items())
    assert not any("policy_number" in v for (i, _), v in REQUIREMENTS.items() if i != "insurance")

# Users

SYNTHETIC = dict(account_number=r"TEST-\d{4}", full_name=r"[A-Z][a-z]+ (Example|Sample|Testova|Placeholder|Demo|Mockman|Fakeley|Dummy)", last_4_ssn=r"432\d",
    date_of_birth=r"19\d\d-[01]\d-[0-3]\d", phone_number=r"\d{3}-555-01\d\d", address=r"\d+ (Example|Sample|Test|Demo) (Street|Road|Lane)", zip_code=r"000\d\d",
    credit_card_last4="|".join(c[-4:] for c in TEST_CARDS), pin=r"\d{4}", email=r"[a-z]+\d\d@example\.(com|org|net)", policy_number=r"DEMO-\d{4}", security_word=r"[a-z]+")

def luhn(card): return sum(sum(divmod(int(c)*(1 + i % 2), 10)) for i, c in enumerate(reversed(card))) % 10 == 0

def test_users(world):
    us = list(world.users.values())
    assert len(us) == 500 and len({u.fields.get("phone_number", u.id) for u in us}) == 500
    lacking = Counter(len(u.missing) for u in us)
    assert (lacking[0], lacking[1]) == (400, 75) and set(lacking) <= {0, 1, 2, 3, 4}
    assert Counter(u.behavior for u in us) == dict(cooperative=350, clarifying=100, difficult=50)
    for u in us:
        for f, v in u.fields.items(): assert re.fullmatch(SYNTHETIC[f], v), (f, v)

def test_test_cards_are_published_ones():
    assert len(TEST_CARDS) >= 8 and all(map(luhn, TEST_CARDS))
    assert {"4242", "1111", "4444", "0005", "8431", "1117", "9424", "5100"} <= {c[-4:] for c in TEST_CARDS}

# Tasks

def test_task_counts(world):
    mixes = dict(train=(100, 150, 150, 50, 50), val=(20, 30, 30, 10, 10), test=(100, 150, 150, 50, 50))
    for split, mix in mixes.items():
        ts = world.tasks[split]
        assert Counter(t.level for t in ts) == dict(enumerate(mix, 1))
        stuck = sum(t.ground_truth.ending == "tell_user" for t in ts)
        assert 0.4 <= stuck / mix[3] <= 0.6
        if split == "train": assert not any(t.heldout for t in ts)
        else:
            held = Counter(t.level for t in ts if t.heldout)
            assert held == {level: n // 2 for level, n in enumerate(mix, 1)}
        assert len({t.id for t in ts}) == len(ts) and all(t.id.startswith(split + "-") and t.split == split for t in ts)
    everything = [(t.company_id, t.request_type, t.user_id) for ts in world.tasks.values() for t in ts]
    assert len(set(everything)) == len(everything)

def test_nothing_held_out_is_in_training(world):
    hidden = [c.name for c in world.companies.values() if c.heldout]
    practised = {(t.company_id, t.request_type) for t in world.tasks["train"]}
    assert len(practised) > 400
    for t in world.tasks["train"]: assert not any(n in t.request or n == t.company_name for n in hidden)
    for t in (*world.tasks["val"], *world.tasks["test"]): assert (t.company_id, t.request_type) not in practised

def test_levels_mean_what_they_say(world):
    for split in world.tasks:
        for s in world.scenarios(split):
            t, gt, path, have = s.task, s.task.ground_truth, s.path, s.user.fields
            assert len(s.accepted) <= 9 and 12 - len(s.accepted) > max(TOLERANCE.values())
            assert gt == solve(s.company, s.user, t.request_type) and t.company_name in t.request and len(t.request.split()) < 20
            assert gt.phones == tuple(d.phone for d in path) and gt.path == tuple(d.name for d in path)
            if t.level != 4: assert set(s.accepted) <= set(have) and not gt.missing and gt.ending == "served"
            if t.level == 1: assert len(path) == 1 and len(gt.required_fields) in (1, 2)
            if t.level == 2: assert len(path) == 1 and len(gt.required_fields) in (3, 4)
            if t.level == 3: assert len(path) == 2
            if t.level == 5: assert len(path) >= 3
            if t.level == 4:
                f, = gt.missing
                sub = path[0].alternatives.get(f)
                assert len(path) == 1 and f in path[0].auth_fields and f not in have
                assert (sub in have) == (gt.ending == "served") and (gt.ending == "tell_user" or sub in gt.required_fields)

# Building blocks

@quick
@given(SEEDS, st.sampled_from(sorted(REQUESTS)))
def test_request_text_names_the_company_and_is_short(seed, key):
    text = request_text(rng_for(seed), key, "Harbor Bank")
    assert text.count("Harbor Bank") == 1 and "{" not in text and len(text.split()) < 20
    assert text == request_text(rng_for(seed), key, "Harbor Bank")

def test_request_texts_vary_and_are_told_apart():
    texts = {k: {request_text(rng_for(s), k, "X Y") for s in range(300)} for k in REQUESTS}
    assert all(len(t) >= 20 and len(set(REQUESTS[k].phrases)) >= 6 for k, t in texts.items())
    assert not any(texts[a] & texts[b] for a, b in itertools.combinations(texts, 2))

@quick
@given(SEEDS, st.sampled_from(sorted(REQUIREMENTS)))
def test_odd_fields_differ_by_one_step(seed, key):
    old, new = set(REQUIREMENTS[key]), set(odd_fields(rng_for(seed), REQUIREMENTS[key], key[0]))
    assert 1 <= len(new) <= 5 and 1 <= len(old ^ new) <= 2 and abs(len(old) - len(new)) <= 1

@quick
@given(SEEDS, st.sampled_from(sorted(REQUESTS)), st.sampled_from(INDUSTRIES), st.sets(st.sampled_from(DEPARTMENTS[1:]), min_size=1))
def test_paths_stay_inside_the_company(seed, key, industry, others):
    has = tuple(d for d in DEPARTMENTS if d == "Customer Service" or d in others)
    rule = rule_path(key, industry, has)
    for path in [rule] + ([odd_path(rng_for(seed), rule, has)] if rule else []): assert set(path) <= set(has) and len(set(path)) == len(path) <= 4

@quick
@given(SEEDS)
def test_random_companies_are_valid_and_repeat(seed):
    c = random_company(rng_for(seed))
    assert c == random_company(rng_for(seed)) and {r.request_type for r in c.routing} == set(REQUESTS)
    s = random_scenario(rng_for(seed))
    assert s.task.level == level_of(s.company, s.user, s.task.request_type) and len(s.accepted) <= 9

def test_random_companies_know_nothing_of_the_rules():
    rng = rng_for(0)
    cs = [random_company(rng) for _ in range(400)]
    deps = [(c.industry, d) for c in cs for d in c.departments]
    assert sum(d.auth_fields == REQUIREMENTS[i, d.name] for i, d in deps) / len(deps) < 0.03
    used = Counter(f for _, d in deps for f in d.auth_fields)
    assert set(used) == set(AUTH_FIELDS) and max(used.values()) < 1.5*min(used.values())

# Directory

def test_search_shows_no_requirements(world0, directory):
    assert [f.name for f in dataclasses.fields(DepartmentInfo)] == ["name", "phone", "description"]
    assert [f.name for f in dataclasses.fields(CompanyInfo)] == ["company_id", "name", "departments"]
    for c in world0.companies.values():
        info = directory.search(c.name)
        assert info.company_id == c.id and [(d.name, d.phone) for d in info.departments] == [(d.name, d.phone) for d in c.departments]
        with pytest.raises(dataclasses.FrozenInstanceError): info.name = "x"

@quick
@given(st.data())
def test_search_forgives_a_slip(world0, directory, data):
    c = data.draw(st.sampled_from(sorted(world0.companies.values(), key=lambda c: c.id)))
    i, name = data.draw(st.integers(0, len(c.name) - 1)), c.name
    slips = [name[:i] + name[i+1:], name[:i] + "x" + name[i:], name.upper(), f"  {name.lower()} ", name.replace(" ", "-"), name.split()[0], f"{name}, Inc."]
    assert directory.search(data.draw(st.sampled_from(slips))).company_id == c.id

@quick
@given(st.text(max_size=30))
def test_search_finds_or_raises_key_error(directory, text):
    try: assert directory.search(text).name
    except KeyError as e: assert repr(text) in e.args[0] and "nearest names are" in e.args[0]

def test_ambiguous_and_foreign_names_are_refused(directory):
    for query in "Bank", "Market", "Telecom", "Zzyzx Holdings", "", "the":
        with pytest.raises(KeyError, match="nearest names"): directory.search(query)
    with pytest.raises(KeyError, match="empty"): CompanyDirectory([]).search("x")

def test_lookup_phone(world0, directory):
    for c in world0.companies.values():
        for d in c.departments:
            a, b, e = d.phone.split("-")
            for number in d.phone, f"({a}) {b}-{e}", f"+1 {a} {b} {e}", f"1{a}{b}{e}", f" {a}.{b}.{e} ":
                assert directory.lookup_phone(number) is d and directory.company_of(number) is c
    for number in "555-0100", "", "999-555-0100", "call me", "2" + c.departments[0].phone:
        with pytest.raises(KeyError, match=re.escape(repr(number))): directory.lookup_phone(number)

def test_directory_refuses_duplicates(world0):
    a, b = itertools.islice(world0.companies.values(), 2)
    with pytest.raises(ValueError, match="two companies are called"): CompanyDirectory([a, dataclasses.replace(b, name=a.name.upper())])
    with pytest.raises(ValueError, match="another number"): CompanyDirectory([a, dataclasses.replace(a, name="Other Bank")])

def test_requirements_respect_alternatives(world0, directory):
    for s in world0.scenarios("train"):
        told = {f: s.user.fields[f] for f in s.task.ground_truth.required_fields if f in s.user.fields}
        served = s.task.ground_truth.ending == "served"
        assert all(directory.validate_auth_requirements(d, told) for d in s.path) == served
        for f in told:
            less = {k: v for k, v in told.items() if k != f}
            if any(d.alternatives.get(f) in less for d in s.path): continue # Another department wants the substitute anyway
            assert not all(directory.validate_auth_requirements(d, less) for d in s.path)
            assert not all(directory.validate_auth_requirements(d, less | {f: " "}) for d in s.path)

# User

@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("field", AUTH_FIELDS)
def test_every_field_is_told_in_time(field, behavior):
    sim = UserSimulator(random_user(rng_for(3), behavior=behavior))
    question = f"What is your {AUTH_FIELDS[field]}?"
    assert sim._parse_question_intent(question) == ("ask", field)
    answers = [sim.respond("a", question) for _ in range(2)]
    assert (sim.value(field) in answers[0]) == (behavior == "cooperative") and sim.value(field) in answers[1]
    other = sim.respond("b", question)
    assert (sim.value(field) in other) == (behavior == "cooperative"), "conversations are not apart"

@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_missing_field(behavior):
    user = random_user(rng_for(3), lacks=("pin", "email"), behavior=behavior)
    for seed in range(10):
        assert "I don't have that" in UserSimulator(user, seed).respond("a", "Please tell me your PIN.")
    assert UserSimulator(user).value("pin") is None

def test_a_reason_brings_out_what_was_held_back():
    sim = UserSimulator(random_user(rng_for(3), lacks=("email",), behavior="difficult"))
    assert sim.value("pin") not in sim.respond("a", "Your PIN and your email?")
    answer = sim.respond("a", "They require it for verification.")
    assert sim.value("pin") in answer and "I don't have that" in answer
    assert sim.respond("a", "Could you repeat that?") == answer and len(sim.history("a")) == 3
    sim.forget("a")
    assert sim.history("a") == ()

def test_words_vary_by_seed_and_repeat():
    user = random_user(rng_for(3), behavior="cooperative")
    says = [UserSimulator(user, s).respond("a", "Your ZIP code?") for s in range(30)]
    assert len(set(says)) >= 3 and says == [UserSimulator(user, s).respond("a", "Your ZIP code?") for s in range(30)]

@quick
@given(st.text(max_size=60), SEEDS)
def test_user_answers_anything_and_tells_only_what_is_asked(text, seed):
    sim = UserSimulator(random_user(rng_for(seed), behavior="cooperative"), seed)
    answer, asked = sim.respond("a", text), fields_in(text)
    assert answer
    if not asked: assert not any(v in answer for v in sim.profile.fields.values())

def test_questions_in_other_words():
    for text, want in {"When were you born?": ("date_of_birth",), "what is your e-mail": ("email",), "Your SSN please": ("last_4_ssn",),
        "your acount number?": ("account_number",), "Which postal code, and which security word?": ("zip_code", "security_word"),
        "Is it sunny in your opinion?": (), "What are the last four digits of your credit card?": ("credit_card_last4",)}.items(): assert fields_in(text) == want
    with pytest.raises(KeyError, match="did you mean 'policy_number'"): UserSimulator(random_user(rng_for(0))).value("policy_num")

# Validator

@pytest.fixture
def files(tmp_path, world0): return save_world(world0, tmp_path)

def check(files): return validate_files(files["companies"], files["users"], [files[k] for k in ("train", "val", "test")])
LISTS = {"companies.json": "companies", "user_profiles.json": "users"}
def read(path): return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)[LISTS[path.name]]
def write(path, rows): return write_jsonl(path, rows) if path.suffix == ".jsonl" else write_json(path, read_json(path) | {LISTS[path.name]: rows})
def put(*keys, to):
    def change(rows):
        x = rows
        for k in keys[:-1]: x = x[k]
        x[keys[-1]] = to(x[keys[-1]]) if callable(to) else to
    return change
def copy_row(a, b, *keys): return lambda rows: [rows[b].__setitem__(k, copy.deepcopy(rows[a][k])) for k in keys]
def held_out(world): return next(c for c in world.companies.values() if c.heldout)

MUTATIONS = [ # File, change, row (0-based), what the message must hold
    ("companies", put(3, "industry", to="farm"), 3, "industry: "),
    ("companies", put(3, "departments", 0, "phone", to="212-444-0101"), 3, "departments.0.phone: "),
    ("companies", put(3, "departments", 1, "auth_fields", to=[]), 3, "departments.1.auth_fields: "),
    ("companies", put(3, "departments", 1, "auth_fields", to=["shoe_size"]), 3, "shoe_size"),
    ("companies", lambda rows: rows[3].update(surprise=1), 3, "surprise: "),
    ("companies", lambda rows: rows[3].pop("routing"), 3, "routing: Field required"),
    ("companies", copy_row(2, 5, "id"), 5, "id: "),
    ("companies", copy_row(2, 5, "name"), 5, "name: "),
    ("companies", lambda rows: rows[5]["departments"][0].update(phone=rows[2]["departments"][0]["phone"]), 5, "departments.0.phone: "),
    ("companies", put(5, "departments", 1, "name", to="Customer Service"), 5, "departments.1.name: "),
    ("companies", lambda rows: rows[5]["departments"].__setitem__(slice(0, 1), []), 5, "every company needs Customer Service"),
    ("companies", lambda rows: rows[5]["departments"][0].update(auth_fields=["pin"], alternatives={"email": "pin"}), 5, "departments.0.alternatives: "),
    ("companies", lambda rows: rows[5]["departments"][0].update(auth_fields=["pin", "email"], alternatives={"email": "pin"}), 5, "wanted anyway"),
    ("companies", lambda rows: rows[5]["departments"][0].update(auth_fields=["pin", "pin"], alternatives={}), 5, "occurs twice"),
    ("companies", put(5, "routing", 1, "request_type", to="update_address"), 5, "routing.1.request_type: "),
    ("companies", lambda rows: rows[5]["routing"][0].update(after=[rows[5]["routing"][0]["department"]]), 5, "routing.0.after: "),
    ("users", put(7, "behavior", to="calm"), 7, "behavior: "),
    ("users", put(7, "fields", "full_name", to="John Smith"), 7, "fields.full_name: "),
    ("users", put(7, "fields", "last_4_ssn", to="1234"), 7, "fields.last_4_ssn: "),
    ("users", put(7, "fields", "email", to="ana@mail.test"), 7, "fields.email: "),
    ("users", put(7, "fields", "phone_number", to="212-555-0201"), 7, "fields.phone_number: "),
    ("users", put(7, "fields", "credit_card_last4", to="9876"), 7, "fields.credit_card_last4: "),
    ("users", put(7, "fields", "date_of_birth", to="1970-02-30"), 7, "fields.date_of_birth: "),
    ("users", put(7, "fields", "zip_code", to="10001"), 7, "fields.zip_code: "),
    ("users", copy_row(2, 7, "id"), 7, "id: "),
    ("train", put(4, "level", to=6), 4, "level: "),
    ("train", put(4, "level", to=lambda n: n % 5 + 1), 4, "level: is "),
    ("train", put(4, "company_id", to="c999"), 4, "company_id: no company 'c999'"),
    ("train", put(4, "user_id", to="u999"), 4, "user_id: no user 'u999'"),
    ("train", put(4, "company_name", to="Acme"), 4, "company_name: "),
    ("train", put(4, "request", to="Help me."), 4, "request: does not name"),
    ("train", put(4, "request_type", to="fly"), 4, "request_type: "),
    ("train", put(4, "heldout", to=True), 4, "heldout: "),
    ("train", put(4, "split", to="val"), None, "split: one file holds tasks of train and val"),
    ("train", put(4, "ground_truth", "path", to=["Billing", "Billing"]), 4, "ground_truth.path: "),
    ("train", put(4, "ground_truth", "phones", to=["212-555-0100"]), 4, "ground_truth.phones: "),
    ("train", put(4, "ground_truth", "required_fields", to=["security_word"]), 4, "ground_truth.required_fields: "),
    ("train", put(4, "ground_truth", "missing", to=["pin"]), 4, "ground_truth.missing: "),
    ("test", put(4, "ground_truth", "ending", to=lambda e: dict(served="tell_user", tell_user="served")[e]), 4, "ground_truth.ending: "),
    ("train", copy_row(0, 4, "id"), 4, "id: "),
    ("train", lambda rows: rows.append(rows[0] | dict(id="train-9999")), 500, "the same task"),
]

@pytest.mark.parametrize("kind,change,row,text", MUTATIONS, ids=[f"{k}-{t.strip(': ').replace(' ', '_')}-{i}" for i, (k, _, _, t) in enumerate(MUTATIONS)])
def test_each_mutation_is_reported(files, kind, change, row, text):
    rows = read(files[kind])
    change(rows)
    write(files[kind], rows)
    before = {k: p.read_bytes() for k, p in files.items()}
    errors = check(files)
    place = f"{files[kind]}" if row is None else f"{files[kind]}:{row + 1}: " if kind in ("train", "val", "test") else f"{files[kind]}: item {row}: "
    assert any(e.startswith(place) and text in e for e in errors), errors[:5]
    assert before == {k: p.read_bytes() for k, p in files.items()}, "the validator wrote a file"

def test_the_data_are_valid(files):
    assert check(files) == []

def test_all_errors_at_once(files):
    changes = dict(companies=put(3, "industry", to="farm"), users=put(7, "fields", "email", to="ana@mail.test"),
        train=put(4, "level", to=lambda n: n % 5 + 1), val=put(8, "company_id", to="c999"))
    for kind, change in changes.items():
        rows = read(files[kind])
        change(rows)
        write(files[kind], rows)
    files["test"].write_text(files["test"].read_text().replace('"id": "test-0002"', '"id" "test-0002"'))
    wants = ["companies.json: item 3: industry", "user_profiles.json: item 7: fields.email", "train_tasks.jsonl:5: level", "val_tasks.jsonl:9: company_id", "test_tasks.jsonl:3: not JSON"]
    errors = check(files)
    assert len(errors) == len(wants) and all(any(w in e for e in errors) for w in wants), errors

def test_training_on_a_held_out_company_is_reported(files, world0):
    rows = read(files["train"])
    rows[9]["request"] += f" Unlike {held_out(world0).name}."
    rows[10] = read(files["test"])[next(i for i, t in enumerate(world0.tasks["test"]) if t.heldout)] | dict(id="train-0010", split="train")
    write(files["train"], rows)
    errors = check(files)
    assert any(":10: request: names the held-out company" in e for e in errors)
    assert any(":11: company_id: a training task on a held-out company" in e for e in errors)

def test_a_practised_request_in_validation_is_reported(files):
    rows = read(files["val"])
    rows[0] = read(files["train"])[0] | dict(id="val-0000", split="val")
    write(files["val"], rows)
    assert any(":1: request_type: " in e and "is practised in training" in e for e in check(files))

def test_too_many_accepted_fields_are_reported(files, world0):
    s = next(s for s in world0.scenarios("train") if len(s.path) >= 3)
    rows, every = read(files["companies"]), list(AUTH_FIELDS)
    c = next(r for r in rows if r["id"] == s.company.id)
    for d in c["departments"]:
        if d["name"] == s.path[0].name: d.update(auth_fields=every[:5], alternatives={})
        if d["name"] == s.path[1].name: d.update(auth_fields=every[5:10], alternatives={})
    write(files["companies"], rows)
    assert any("at most 9" in e for e in check(files))

def test_broken_rows_blame_nobody_else(files):
    rows = read(files["users"])
    rows[0]["behavior"] = None
    write(files["users"], rows)
    assert len(errors := check(files)) == 1 and "item 0: behavior" in errors[0]

@pytest.mark.parametrize("kind", FILES)
def test_unreadable_files(files, kind):
    good = files[kind].read_text()
    for bad in "", "{", "null\n", "[1]\n", good[:len(good)//2 - 7], good.replace("{", "[", 1), "[" * 100_000:
        files[kind].write_text(bad)
        assert any(e.startswith(str(files[kind])) for e in check(files)), bad[:20]
    files[kind].write_bytes(b"\xff\xfe\x00")
    assert any(e.startswith(str(files[kind])) for e in check(files))
    files[kind].unlink()
    assert any(e.startswith(str(files[kind])) for e in check(files))

def leaves(x, at=()):
    if isinstance(x, dict): yield from (l for k, v in x.items() for l in leaves(v, (*at, k)))
    elif isinstance(x, list): yield from (l for i, v in enumerate(x) for l in leaves(v, (*at, i)))
    else: yield at

@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_made_null_is_reported(tmp_path_factory, world0, data):
    files = save_world(world0, tmp_path_factory.mktemp("null"))
    kind = data.draw(st.sampled_from(sorted(FILES)))
    rows = read(files[kind])
    i = data.draw(st.integers(0, len(rows) - 1))
    at = data.draw(st.sampled_from(list(leaves(rows[i]))))
    put(i, *at, to=None)(rows)
    write(files[kind], rows)
    place = f"{files[kind]}:{i + 1}: " if files[kind].suffix == ".jsonl" else f"{files[kind]}: item {i}: "
    assert any(e.startswith(place + str(at[0])) for e in check(files))

def test_command(files):
    def run(*a): return subprocess.run([sys.executable, "-m", "fg_dapo.world.validate", *map(str, a)], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(DATA.parent)))
    good = run("--companies", files["companies"], "--users", files["users"], "--tasks", files["train"], files["val"], "--tasks", files["test"])
    assert (good.returncode, good.stdout, good.stderr) == (0, "ok: 100 companies, 500 users, 1100 tasks\n", "")
    rows = read(files["train"])
    rows[0]["level"], rows[1]["company_id"] = 9, "c999"
    write(files["train"], rows)
    bad = run("--companies", files["companies"], "--tasks", files["train"])
    assert bad.returncode == 1 and len(bad.stderr.splitlines()) == 2 and "2 errors in 100 companies" in bad.stdout
    assert main(["--companies", str(files["companies"])]) == 0

@pytest.mark.parametrize("kind", ["standard", "easy"])
def test_seen_requests_are_those_of_training_by_new_users(kind):
    w = generate_world(3, kind)
    some = seen_scenarios(w, "test", 500)
    routes = {(t.company_id, t.request_type): t for t in w.tasks["train"]}
    assert len(some) == 500 and [s.task for s in some] == [s.task for s in seen_scenarios(generate_world(3, kind), "test", 500)]
    assert {s.task.id for s in some}.isdisjoint(t.id for ts in w.tasks.values() for t in ts) and not {s.user.id for s in some} & set(w.users)
    for s in some:
        t = routes[s.company.id, s.task.request_type]
        assert not s.company.heldout and s.task.ground_truth.path == t.ground_truth.path and s.company.name in s.task.request
    val = seen_scenarios(w, "val", 100)
    assert len(val) == 100 and {s.task.level: None for s in val}.keys() == {t.level for t in w.tasks["train"]}
    assert {(s.company.id, tuple(s.user.fields.values())) for s in val}.isdisjoint((s.company.id, tuple(s.user.fields.values())) for s in some)
    levels = [sum(s.task.level == l for s in some) for l in range(1, 6)]
    assert levels == [sum(t.level == l for t in w.tasks["train"]) for l in range(1, 6)]

def test_what_training_reveals_lifts_the_ceiling_of_training_companies():
    w = generate_world(3)
    known, c = revealed(w), rules_ceiling(w)
    assert all(rule_solves(s, rules_of(w), known) for s in seen_scenarios(w, "val", 100)) # Whoever knows by heart solves what was seen
    assert c["training"] < c["training_known"] < 1 and known.isdisjoint((s.company.id, d) for s in w.scenarios("test") if s.task.heldout for d in s.task.ground_truth.path)

def ruled_world(lacks=()):
    "Eight companies of each industry, without exceptions; the last two are held out. One task for every request, by users who lack nothing; those of the test by users without `lacks`."
    rng, users, tasks = rng_for(0, "ruled"), {}, dict(train=[], val=[], test=[])
    counts = [5 if i % 2 else 3 for i in range(32)]
    companies = [ruled_company(rng, f"c{i}", f"Harbor {i} Co", INDUSTRIES[i // 8], i % 8 > 5, n, phones) for i, (n, phones) in enumerate(zip(counts, department_phones(rng, counts)))]
    for c in companies:
        for r in c.routing:
            split, n = "test" if c.heldout else "train", len(users)
            u = random_user(rng, f"u{n}", lacks if c.heldout else ())
            if t := make_task(rng, c, u, r.request_type, f"t{n}", split): users[u.id] = u; tasks[split].append(t)
    return World({c.id: c for c in companies}, users, {k: tuple(v) for k, v in tasks.items()})

def test_majorities_are_the_rules_where_there_are_no_exceptions():
    w = ruled_world()
    routes, fields = majorities(w)
    shown = {(w.companies[t.company_id].industry, t.request_type, t.ground_truth.path) for t in w.tasks["train"]}
    rules = {(i, k): r.path_for(i) for i in INDUSTRIES for k, r in REQUESTS.items() if r.path_for(i)}
    assert {k: p for k, p in rules.items() if (*k, p) in shown} == {k: p for k, p in routes.items() if (*k, rules[k]) in shown} and len(rules) - sum((*k, p) in shown for k, p in rules.items()) == 2 # Fraud wants so much there that it makes no task
    assert routes.keys() == rules.keys()
    assert fields == {k: set(v) for k, v in REQUIREMENTS.items()}
    assert len(w.tasks["test"]) > 100 and told_ceiling(dataclasses.replace(w, tasks=w.tasks | dict(val=w.tasks["train"]))) == dict(training=1.0, heldout=1.0)
    assert told_chance(dataclasses.replace(w, tasks=w.tasks | dict(val=w.tasks["train"]))) == dict(training=1.0, heldout=1.0) # There is nothing else to draw

def test_what_stands_in_is_told_by_users_who_lack_a_field():
    w, (key, swap) = ruled_world(("zip_code",)), (("telecom", "Customer Service"), {"zip_code": "address"})
    assert ALTERNATIVES[key] == swap
    ask = [t for t in w.tasks["test"] if t.request_type == "update_address" and w.companies[t.company_id].industry == "telecom"]
    assert len(ask) == 2 and all(t.ground_truth.missing == ("zip_code",) and t.ground_truth.ending == "served" for t in ask)
    w = dataclasses.replace(w, tasks=w.tasks | dict(test=tuple(ask), val=w.tasks["train"]))
    assert "address" not in majorities(w)[1][key] and told_ceiling(w)["heldout"] == 0
    c = next(c for c in w.train_companies if c.industry == "telecom")
    u = random_user(rng_for(0, "lacks"), "lacks", ("zip_code",))
    told_now = dataclasses.replace(w, users=w.users | {u.id: u}, tasks=w.tasks | dict(train=(*w.tasks["train"], make_task(rng_for(0, "words"), c, u, "update_address", "lacks-zip"))))
    assert majorities(told_now)[1][key] == {"phone_number", "zip_code", "address"} and told_ceiling(told_now)["heldout"] == 1

def test_one_exception_among_many_is_outvoted():
    w = ruled_world()
    odd = next(c for c in w.train_companies if c.industry == "bank" and len(c.departments) == 5)
    other = dataclasses.replace(odd, departments=tuple(dataclasses.replace(d, auth_fields=("email",), alternatives={}) for d in odd.departments),
        routing=tuple(dataclasses.replace(r, after=tuple(reversed(r.after))) for r in odd.routing))
    rng = rng_for(0, "again")
    train = tuple(make_task(rng, other, w.users[t.user_id], t.request_type, t.id) if t.company_id == odd.id else t for t in w.tasks["train"])
    w2 = dataclasses.replace(w, companies=w.companies | {odd.id: other}, tasks=w.tasks | dict(train=train))
    assert sum(a != b for a, b in zip(train, w.tasks["train"])) == 16 and majorities(w2) == majorities(w)

def test_the_training_tasks_tell_nearly_all_that_the_rules_solve():
    for seed in (0, 1, 2):
        w = generate_world(seed)
        rules, tables = rules_ceiling(w), told_ceiling(w)
        for k in ("training", "heldout"): assert 0.85 * rules[k] < tables[k] < rules[k] + 0.02

def test_who_draws_from_the_plans_takes_exceptions_for_rules():
    w = ruled_world()
    def of(split): return [t for t in w.tasks[split] if t.request_type == "update_address" and w.companies[t.company_id].industry == "telecom"]
    train, asked = of("train"), of("test")
    assert len(train) == 6 and len(asked) == 2 and {t.ground_truth.path for t in (*train, *asked)} == {("Customer Service",)}
    def odd(at, **change): return {at.company_id: dataclasses.replace(w.companies[at.company_id], **change)}
    def fields(at): return odd(at, departments=tuple(dataclasses.replace(d, auth_fields=("email",), alternatives={}) if d.name == "Customer Service" else d for d in w.companies[at.company_id].departments))
    sold = next(t for t in train if any(d.name == "Sales" for d in w.companies[t.company_id].departments))
    route = odd(sold, routing=tuple(dataclasses.replace(r, department="Sales", after=()) for r in w.companies[sold.company_id].routing))
    other = next(t for t in train if t is not sold)
    def chance(changed):
        companies = w.companies | changed
        plans = tuple(make_task(rng_for(0, t.id), companies[t.company_id], w.users[t.user_id], t.request_type, t.id) for t in train)
        now = World(companies, w.users, dict(train=plans, val=tuple(train), test=tuple(asked)))
        assert told_ceiling(now)["heldout"] == 1 # By majority nothing changes
        return told_chance(now)["heldout"]
    assert sum(any(d.name == "Sales" for d in w.companies[t.company_id].departments) for t in asked) == 1 # At the other company Customer Service stands in, as it should
    assert chance({}) == 1 and chance(fields(other)) == pytest.approx(5 / 6) and chance(route) == pytest.approx((5 / 6 + 1) / 2)
    assert chance(route | fields(other)) == pytest.approx((5 / 6 + 1) / 2 * 4 / 5) # Five plans tell the fields of Customer Service
