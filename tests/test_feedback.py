"Feedback: what a text may say, that it fits its budget, and what the control arms get."
import re, subprocess, sys
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from fg_dapo.method import feedback as F
from fg_dapo.method.diagnosis import FAILURE_KINDS, FailureInfo
from fg_dapo.method.feedback import (Critique, DETAILS, FEEDBACK_TEMPLATES, MODES, RuleBased, accumulate, augment_prompt, check_facts, clean_name,
    empty_feedback, feedback_section, fit_feedback, quality_gate, rough_tokens, rule_based_feedback, shuffle_feedback)
from fg_dapo.world.records import AUTH_FIELDS, DEPARTMENTS, in_order

FIELD, DEPT = st.sampled_from(list(AUTH_FIELDS)), st.sampled_from(DEPARTMENTS)
FIELDS = st.lists(FIELD, max_size=5, unique=True).map(tuple)
SOME = st.lists(FIELD, min_size=1, max_size=5, unique=True).map(tuple)
DEPTS = st.lists(DEPT, max_size=3, unique=True).map(tuple)
NUMBER = st.from_regex(r"[2-9][0-9]{2}-555-01[0-9]{2}", fullmatch=True)
OBSERVED = st.fixed_dictionaries(dict(type=st.sampled_from(list(FAILURE_KINDS)), company=st.text(max_size=40), asked=FIELDS, superfluous=FIELDS, unavailable=FIELDS,
    called=st.none() | DEPT, told=st.none() | FIELDS, uncalled=DEPTS, accepted=st.dictionaries(DEPT, SOME, max_size=3), still_wants=st.dictionaries(DEPT, SOME, max_size=3),
    wrong_fields=FIELDS, offered=st.dictionaries(FIELD, FIELD, max_size=2), not_handling=DEPTS, redirect_to=st.none() | DEPT, need_first=st.none() | DEPT, next_to=st.none() | DEPT))

@st.composite
def answers(draw):
    path = tuple(draw(st.lists(DEPT, min_size=1, max_size=4, unique=True)))
    return dict(path=path, phones={d: draw(NUMBER) for d in path}, fields={d: draw(SOME) for d in path}, required_fields=draw(SOME), missing=draw(SOME),
        alternatives=draw(st.dictionaries(FIELD, FIELD, max_size=2)), ending=draw(st.sampled_from(["served", "tell_user"])))

ANSWER = dict(path=("Customer Service", "Billing"), phones={"Customer Service": "212-555-0143", "Billing": "212-555-0142"},
    fields={"Customer Service": ("full_name",), "Billing": ("account_number", "pin")}, required_fields=("account_number", "full_name", "pin"))
INFO = FailureInfo("missing_auth", "Harbor Bank", asked=("full_name", "account_number"), called="Billing", accepted={"Billing": ("account_number",)}, still_wants={"Billing": ("pin",)}, **ANSWER)

# What a text may say

@given(OBSERVED, answers(), answers())
def test_the_answer_does_not_change_what_was_observed(seen, a, b):
    for d in ("hint", "observed"): assert rule_based_feedback(FailureInfo(**seen, **a), d) == rule_based_feedback(FailureInfo(**seen, **b), d) == rule_based_feedback(FailureInfo(**seen), d)

@given(OBSERVED, OBSERVED)
def test_a_hint_tells_the_kind_and_nothing_else(a, b): assert rule_based_feedback(FailureInfo(**a), "hint") == rule_based_feedback(FailureInfo(**(b | dict(type=a["type"]))), "hint")

def template_words():
    "The literal words of all sources, and the two that stand inside of expressions."
    literal = re.sub(r"\{[{%].*?[%}]\}", " ", "\n".join([F.MACROS, *(s for t in FEEDBACK_TEMPLATES.values() for s in t.values())]))
    inside = "Wrong value for still wants accepted Required fields A department a is are nothing did not get every field it could verify you"
    return set(re.findall(r"\w+", f"{literal} {inside}"))

@settings(max_examples=200)
@given(OBSERVED, answers(), st.sampled_from(DETAILS))
def test_a_text_holds_names_and_template_words_only(seen, answer, detail):
    info = FailureInfo(**seen, **answer)
    text = rule_based_feedback(info, detail)
    name = clean_name(info.company)
    allowed = template_words() | set(AUTH_FIELDS) | {w for d in DEPARTMENTS for w in d.split()} | set(re.findall(r"\w+", name))
    bare = text if detail != "full" else re.sub("|".join(info.phones.values()), "", text)
    assert set(re.findall(r"\w+", bare)) <= allowed
    assert not any(c in text.replace(name, "") for c in "<>{}\n\t\"\\")

@given(st.text(max_size=200))
def test_a_company_name_stays_a_name(name):
    assert re.fullmatch(r"[\w .&'-]{1,60}", clean_name(name))
    assert clean_name(clean_name(name)) == clean_name(name)

def test_a_company_name_is_short(): assert clean_name("Harbor " * 50) == ("Harbor " * 9)[:60].strip()
def test_a_company_name_is_not_a_template(): assert "49" not in rule_based_feedback(FailureInfo("unknown_company", "{{ 7 * 7 }} Bank"))

VALUE = "7313"
SLOTS = [dict(asked=(VALUE,)), dict(superfluous=(VALUE,)), dict(unavailable=(VALUE,)), dict(told=(VALUE,)), dict(uncalled=(VALUE,)), dict(not_handling=(VALUE,)), dict(next_to=VALUE), dict(wrong_fields=(VALUE,)),
    dict(required_fields=(VALUE,)), dict(missing=(VALUE,)), dict(offered={"pin": VALUE}), dict(offered={VALUE: "pin"}), dict(alternatives={"pin": VALUE}),
    dict(alternatives={VALUE: "pin"}), dict(called=VALUE), dict(redirect_to=VALUE), dict(need_first=VALUE), dict(accepted={VALUE: ()}),
    dict(accepted={"Billing": (VALUE,)}), dict(still_wants={VALUE: ()}), dict(still_wants={"Billing": (VALUE,)}), dict(fields={VALUE: ()}), dict(fields={"Billing": (VALUE,)}), dict(path=(VALUE,)), dict(phones={VALUE: "212-555-0142"}),
    dict(phones={"Billing": VALUE}), dict(ending=VALUE)]

@pytest.mark.parametrize("slot", SLOTS, ids=str)
@pytest.mark.parametrize("detail", DETAILS)
def test_a_value_in_any_place_is_refused_and_named(slot, detail):
    with pytest.raises(ValueError, match=f"'{VALUE}'.*{'' if 'ending' in slot else next(iter(slot))}"): rule_based_feedback(replace(INFO, **slot), detail)

def test_every_fact_is_checked():
    told = {k for s in SLOTS for k in s}
    assert told == set(FailureInfo.__dataclass_fields__) - {"type", "company"}

@pytest.mark.parametrize("number", ["555-0142", "212-555-0242", "212-555-0142\n", "212-555-01420", "٢12-555-0142", ""])
def test_only_numbers_reserved_for_fiction(number):
    with pytest.raises(ValueError, match="is no number of a department"): check_facts(replace(INFO, phones={"Billing": number}))

@pytest.mark.parametrize("kind", FAILURE_KINDS)
def test_every_kind_has_short_texts(kind):
    assert set(FEEDBACK_TEMPLATES[kind]) == set(DETAILS)
    bare = FailureInfo(kind, "Harbor Bank")
    assert len(rule_based_feedback(bare, "hint").split()) <= 12
    for called in (None, "Billing"): assert len(rule_based_feedback(replace(bare, called=called)).split()) <= 25
    for d in ("hint", "observed"): assert quality_gate(rule_based_feedback(bare, d), bare) is None

# What a text says

def test_observed_says_every_fact_once_and_in_the_registrys_order():
    info = FailureInfo("wrong_department", "Harbor Bank", asked=("pin", "account_number"), superfluous=("email", "zip_code"), unavailable=("pin",), called="Billing",
        accepted={"Sales": ("full_name",), "Customer Service": ("email", "full_name")}, still_wants={"Customer Service": ("pin", "account_number")}, wrong_fields=("full_name",),
        offered={"pin": "security_word"}, not_handling=("Sales", "Billing"), redirect_to="Fraud", need_first="Customer Service", next_to="Technical Support")
    assert rule_based_feedback(info) == ("make_phone_call reached Billing, which does not handle this request. You asked for: account_number, pin. "
        "The user refused; not needed: zip_code, email. The user does not have pin. Customer Service accepted: full_name, email. Sales accepted: full_name. Wrong value for: full_name. "
        "Customer Service still wants: account_number, pin. Billing takes security_word instead of pin. Billing does not handle this. Sales does not handle this. Call Customer Service first. "
        "Fraud handles this. Call Technical Support next.")

@pytest.mark.parametrize("told, said", [((), "You told Billing nothing."), (("pin", "email"), "You told Billing: pin, email.")])
def test_a_silent_call_leaves_what_was_told_and_who_was_not_called(told, said):
    info = FailureInfo("unverified", "Harbor Bank", asked=("pin",), called="Billing", told=told, uncalled=("Sales", "Customer Service"))
    assert rule_based_feedback(info) == f"Billing could not verify you in make_phone_call and told you nothing. You asked for: pin. {said} Not called: Customer Service, Sales."

WHY = "Billing did not get every field it wants in make_phone_call."
ORDER = "Right order: Customer Service 212-555-0143: full_name; Billing 212-555-0142: account_number, pin."

@pytest.mark.parametrize("change, plan", [
    (dict(), f"Required fields: account_number, full_name, pin. {ORDER}"),
    (dict(required_fields=("security_word", "account_number", "full_name"), missing=("pin",), alternatives={"pin": "security_word"}),
        f"Required fields: account_number, full_name, security_word. Use security_word instead of pin. {ORDER}"),
    (dict(missing=("pin",), ending="tell_user"),
        "Required fields: account_number, full_name, pin. Nothing that the user has stands in for pin: tell the user that pin is missing."),
    (dict(required_fields=("account_number", "full_name", "pin", "email"), missing=("pin", "email"), ending="tell_user"),
        "Required fields: account_number, full_name, pin, email. Nothing that the user has stands in for pin, email: tell the user that pin, email are missing."),
    (dict(missing=("pin", "email"), alternatives={"email": "zip_code"}, ending="tell_user"),
        "Required fields: account_number, full_name, pin. Use zip_code instead of email. Nothing that the user has stands in for pin: tell the user that pin is missing."),
])
def test_full_ends_in_the_plan(change, plan): assert rule_based_feedback(replace(INFO, **change), "full") == f"{WHY} {plan}"

def test_the_order_of_the_path_is_kept():
    back = replace(INFO, path=("Billing", "Customer Service"))
    assert rule_based_feedback(back, "full").endswith("Right order: Billing 212-555-0142: account_number, pin; Customer Service 212-555-0143: full_name.")

@pytest.mark.parametrize("change, lack", [(dict(path=()), "path"), (dict(required_fields=()), "required_fields"), (dict(phones={}), r"phones\[Customer Service\]"),
    (dict(fields={"Billing": ("pin",)}), r"fields\[Customer Service\]"), (dict(ending="tell_user"), "missing")])
def test_full_without_the_answer_says_what_it_lacks(change, lack):
    with pytest.raises(ValueError, match=f"needs the answer, and .*{lack}"): rule_based_feedback(replace(INFO, **change), "full")
    rule_based_feedback(replace(INFO, **change))

def test_facts_from_json_make_the_same_text():
    listed = replace(INFO, asked=list(INFO.asked), accepted={}, still_wants={"Billing": ["pin"]})
    assert rule_based_feedback(listed) == rule_based_feedback(replace(INFO, accepted={}, still_wants={"Billing": ("pin",)}))

def test_an_edited_template_is_used(monkeypatch):
    rule_based_feedback(INFO)
    monkeypatch.setitem(FEEDBACK_TEMPLATES["missing_auth"], "observed", "Wanted: {{ names(o.still_wants[o.called]) }}.")
    assert rule_based_feedback(INFO) == "Wanted: pin."
    assert F._compiled("a") is F._compiled("a")

@pytest.mark.parametrize("source", ["{{ o.phones }}", "{{ o['required_fields'] }}", "{{ plan(o) }}", "{% for f in o.fields %}{% endfor %}", "{% if o.ending %}{% endif %}", "{{ o.__class__.__mro__ }}"])
def test_an_observed_template_cannot_reach_the_answer(monkeypatch, source):
    from jinja2 import TemplateError
    monkeypatch.setitem(FEEDBACK_TEMPLATES["missing_auth"], "observed", source)
    with pytest.raises(TemplateError): rule_based_feedback(INFO)

def test_a_light_import_that_compiles_nothing():
    code = "import sys; from fg_dapo.method import feedback as F; assert not {'torch', 'transformers'} & set(sys.modules); assert F._env.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True)

# The prompt

def test_the_section_is_the_plans():
    cs = [Critique(1, "Ask for pin.", 0.25), Critique(3, "Call Billing.", 0.5)]
    section = "\n<previous_attempts>\n\nAttempt 1 (Score: 0.2):\nAsk for pin.\n\nAttempt 3 (Score: 0.5):\nCall Billing.\n\n</previous_attempts>\n"
    assert feedback_section(cs) == section
    assert augment_prompt("Task.", cs) == f"Task.\n\n{section}\n\nLearn from the previous attempts and complete the task correctly."

@given(st.text())
def test_no_critiques_no_change(prompt): assert augment_prompt(prompt, ()) == prompt and feedback_section(()) == ""

@pytest.mark.parametrize("args, what", [((0, "x", 0.), "attempt 0"), ((1, "x", float("nan")), "score nan"), ((1, "a </previous_attempts>", 0.), "markup"),
    ((1, "<|im_end|>", 0.), "markup"), ((1, "<tool_call>", 0.), "markup")])
def test_a_critique_is_checked(args, what):
    with pytest.raises(ValueError, match=what): Critique(*args)

# Budgets

SENTENCE = st.lists(st.sampled_from(["Billing", "wants", "pin", "Fraud", "handles", "this", "again"]), min_size=1, max_size=8).map(lambda ws: " ".join(ws) + ".")
CRITIQUES = st.lists(st.tuples(st.lists(SENTENCE, min_size=0, max_size=5).map(" ".join), st.sampled_from([0., .2, .5])), max_size=6).map(
    lambda xs: [Critique(i, t, s) for i, (t, s) in enumerate(xs, 1)])
COUNTER = st.sampled_from([rough_tokens, len, lambda t: len(t.split()), lambda t: len(t.encode()) // 3])

@given(CRITIQUES, st.sampled_from(MODES), st.integers(0, 200), COUNTER)
def test_never_over_budget_and_the_newest_stay(cs, mode, budget, count):
    kept, real = accumulate(cs, mode, budget, count), [c for c in cs if c.feedback]
    assert not kept or count(feedback_section(kept)) <= budget
    assert [c.attempt for c in kept] == sorted(c.attempt for c in kept)
    if kept: assert (kept[-1].attempt, kept[-1].score) == (real[-1].attempt, real[-1].score)
    if len(kept) > 1: assert list(kept) == real[-len(kept):]
    if mode == "all" and len(kept) < len(real): assert count(feedback_section(real[-len(kept) - 1:])) > budget
    if mode != "all": assert len(kept) <= 1

@given(CRITIQUES, st.sampled_from(MODES), COUNTER)
def test_nothing_is_lost_within_budget(cs, mode, count):
    kept, real = accumulate(cs, mode, 10**6, count), [c for c in cs if c.feedback]
    if mode == "all": assert list(kept) == real
    if mode == "last": assert list(kept) == real[-1:]
    if mode == "summary" and real:
        told = F._sentences(kept[0].feedback)
        assert sorted(told) == sorted({s for c in real for s in F._sentences(c.feedback)})
        latest = list(dict.fromkeys(reversed(F._sentences(real[-1].feedback))))
        assert told[::-1][:len(latest)] == latest
        assert accumulate(kept, mode, 10**6, count) == kept

def test_identical_texts_are_kept_by_all_and_merged_by_summary():
    cs = [Critique(1, "Ask for pin.", 0.), Critique(2, "Call Fraud. Ask for pin.", .2), Critique(3, "Ask for pin.", .3)]
    assert accumulate(cs, "all") == tuple(cs)
    assert accumulate(cs, "summary") == (Critique(3, "Call Fraud. Ask for pin.", .3),)
    assert accumulate(cs[::-1], "all") == tuple(cs)

def test_a_long_critique_is_cut_from_its_start():
    one = Critique(1, "Billing wants pin. Call Fraud first. Ask for pin.", .2)
    size = rough_tokens(feedback_section([one]))
    assert accumulate([one], max_tokens=size) == (one,)
    assert accumulate([one], max_tokens=size - 1)[0].feedback == "Call Fraud first. Ask for pin."
    assert accumulate([one], max_tokens=size - 5)[0].feedback == "Ask for pin."
    assert accumulate([one], max_tokens=size - 9) == ()

@pytest.mark.parametrize("kw, what", [(dict(mode="best"), "'best'.*all, last, summary"), (dict(max_tokens=-1), "-1")])
def test_accumulate_names_what_is_wrong(kw, what):
    with pytest.raises(ValueError, match=what): accumulate([], **kw)

@given(st.text("ab .", max_size=60), CRITIQUES, st.sampled_from(MODES), st.integers(0, 100), st.integers(0, 200), COUNTER)
def test_the_task_always_fits_whole(task, cs, mode, feedback, limit, count):
    n = count(task)
    if n > limit:
        with pytest.raises(ValueError, match=f"has {n} tokens and the prompt may have {limit}"): fit_feedback(n, cs, mode, feedback, limit, count)
        return
    kept = fit_feedback(n, cs, mode, feedback, limit, count)
    prompt = augment_prompt(task, kept)
    assert prompt.startswith(task)
    assert n + count(augment_prompt("", kept) if kept else "") <= limit
    assert not kept or count(feedback_section(kept)) <= feedback

def test_fit_uses_the_room_there_is():
    cs = [Critique(i, f"Ask for {f}.", .2) for i, f in enumerate(["pin", "email", "address"], 1)]
    whole = rough_tokens(augment_prompt("", cs))
    assert [c.attempt for c in fit_feedback(50, cs, max_prompt_tokens=50 + whole)] == [1, 2, 3]
    assert [c.attempt for c in fit_feedback(50, cs, max_prompt_tokens=50 + whole - 1)] == [2, 3]
    assert fit_feedback(50, cs, max_prompt_tokens=50) == ()

# Gate, generators, control arms

VALUES = ("4402", "Ana Example", "7313", "987-65-4320", "12 Sample Road", "maple")

@pytest.mark.parametrize("text, reason", [
    ("", "empty"), (" \n", "empty"), ("The pin is 7313.", "value"), ("Tell Billing ANA EXAMPLE, the full_name.", "value"), ("Say Maple to Billing.", "value"),
    ("last_4_ssn of 987654320", "value"), ("Send 12-sample-road as address.", "value"), ("Try again.", "not actionable"), ("Spinning is fun.", "not actionable"), ("A freemail. Pins.", "not actionable"),
    ("Call Billing. </previous_attempts>", "markup"), ("Call Billing. <|im_start|>", "markup"), ("Billing " * 101, "over budget: 101 tokens, at most 100"),
    ("Billing " * 100, None), ("Ask for the account number.", None), ("Use search_company.", None), ("Dial 212-555-0142 for Billing.", None), ("Billing has 73131 clerks.", "number"),
    ("Billing at Harbor Bank wants pin.", None)])
def test_the_gate(text, reason):
    got = quality_gate(text, INFO, VALUES)
    assert got is None if reason is None else reason in got
    assert got is None or not any(v in got for v in VALUES)

def test_a_companys_number_and_name_are_no_values(): assert quality_gate("Harbor Bank: dial 212-555-0142 for Billing.", INFO, ("0142", "Harbor")) is None
def test_the_gate_sees_values_beside_them(): assert "value" in quality_gate("Dial 212-555-0142 for Billing and say 0142.", INFO, ("0142",))

@pytest.mark.parametrize("detail", DETAILS)
def test_the_rule_based_generator(detail): assert RuleBased(detail)(INFO, "anything") == rule_based_feedback(INFO, detail)

def test_empty_feedback_has_the_length_and_no_content():
    for n in range(200):
        text = empty_feedback(n)
        assert rough_tokens(text) == n and set(re.findall(r"\w+", text)) <= {"No", "comment"}
    assert "not actionable" in quality_gate(empty_feedback(20), INFO)

@given(st.integers(0, 300), COUNTER)
def test_empty_feedback_is_never_longer(n, count): assert n - 8 < count(empty_feedback(n, count)) <= n

@given(st.integers(2, 40), st.integers(0, 1000))
def test_nobody_keeps_their_own_feedback(n, seed):
    out = shuffle_feedback(range(n), seed)
    assert sorted(out) == list(range(n)) and all(i != x for i, x in enumerate(out))
    assert out == shuffle_feedback(range(n), seed)

def test_shuffling_depends_on_the_seed():
    assert len({tuple(shuffle_feedback(range(6), s)) for s in range(50)}) > 30
    assert shuffle_feedback([], 0) == []
    with pytest.raises(ValueError, match="1 group"): shuffle_feedback(["alone"], 0)
