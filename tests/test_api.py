"Recorded calls of ToolBench and API-Bank: what counts as done, what is refused, and that no text of a file is run."
import json

import pytest

from fg_dapo.domains.api.recorded import (FORMS, RecordedCall, RecordedEpisode, function_name, load_apibank,
    load_toolbench, make, needed_before, observed_schemas, read_request, recorded_feedback)
from fg_dapo.env.checks import check
from fg_dapo.env.seam import DETAILS, Environment, ToolCall, Turn

DIALOGUE = [dict(role="User", text="I am ann. Please book a room on Monday."),
    dict(role="API", api_name="GetToken", param_dict=dict(user="ann"), result=dict(output=dict(token="a1b2c3"))),
    dict(role="AI", text="API-Request: [BookRoom(token='a1b2c3', day='Monday')]", result="booked"),
    dict(role="User", text="And thank you."), dict(role="AI", text="It is booked.")]
APIS = [dict(category_name="Weather", tool_name="Sky", api_name=name, api_description="Weather.",
    required_parameters=[dict(name="city", type="STRING")], optional_parameters=[dict(name="days", type="NUMBER")])
    for name in ("Now", "Later")]


@pytest.fixture
def dialogues(tmp_path):
    paths = []
    for i in range(5):
        path = tmp_path / f"talk-{i}.jsonl"
        path.write_text("".join(json.dumps(t) + "\n" for t in DIALOGUE), encoding="utf-8")
        paths.append(path)
    return paths


@pytest.fixture
def queries(tmp_path):
    rows = [dict(query=f"Weather in town {i}?", query_id=i, api_list=APIS) | {"relevant APIs": [["Sky", "Now"]]} for i in range(10)]
    path = tmp_path / "G1_query.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def played(task, calls):
    episode = RecordedEpisode(task, observed_schemas([task]))
    for name, arguments in calls:
        if not episode.done: episode.act(Turn(calls=(ToolCall(name, arguments),)))
    while not episode.done: episode.act(Turn("Done."))
    return episode


def test_the_recorded_calls_are_done_and_others_are_not(dialogues):
    task = load_apibank(dialogues)[0]
    gold = [(c.name, c.arguments) for c in task.calls]
    assert played(task, gold).outcome().success
    assert not played(task, []).outcome().success
    assert not played(task, gold[:1]).outcome().success
    assert not played(task, gold[::-1]).outcome().success
    wrong = [gold[0], ("bookroom", dict(token="a1b2c3", day="Tuesday"))]
    assert played(task, wrong).outcome().score == 0.25
    assert task.messages == ("I am ann. Please book a room on Monday.", "And thank you.")


def test_an_order_that_the_data_allow():
    one, other = RecordedCall("a", dict(x="said"), dict(y="hidden")), RecordedCall("b", dict(y="hidden"), None)
    free = RecordedCall("c", dict(x="said"), None)
    assert needed_before([one, free, other], "said") == ((), (), (0,))
    assert needed_before([one, free, other], "said hidden") == ((), (), ())


@pytest.mark.parametrize("text", ["API-Request: [__import__('os').system('true')]", "API-Request: [f(x=__import__('os'))]",
    "API-Request: [f(1)]", "API-Request: [f(**{'a': 1})]", "API-Request: [f(a=]", "API-Request: []", "nothing",
    "API-Request: [f(a=b)]", f"API-Request: [f(a={'(' * 500}1{')' * 500})]"])
def test_a_text_of_a_file_is_read_as_literals_or_refused(text):
    with pytest.raises(ValueError): read_request(text)


def test_literals_are_read():
    assert read_request("API-Request: [Find(a='x, y', b=[1, 2], c={'d': None})]") == ("Find", dict(a="x, y", b=[1, 2], c=dict(d=None)))


def test_errors_name_file_and_turn(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(dict(role="User", text="Hello")) + "\n" + json.dumps(dict(role="API", param_dict={})) + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl: turn 2: 'api_name'"): load_apibank([path])
    other = tmp_path / "bad.json"
    other.write_text(json.dumps([dict(query="Hello", api_list=APIS) | {"relevant APIs": [["Sky", "Never"]]}]))
    with pytest.raises(ValueError, match=r"bad\.json: item 0: .*sky_never"): load_toolbench([other])
    with pytest.raises(ValueError, match="no form 'toolbank'; there are toolbench, apibank"): make(form="toolbank", files=[path])
    with pytest.raises(ValueError, match="no files"): make(form=FORMS[0], files=[])


def test_a_relevant_api_needs_its_required_parameters(queries):
    env = make(form="toolbench", files=[queries])
    task = env.tasks("all")[0]
    bare, right = env.open(task), env.open(task)
    bare.act(Turn(calls=(ToolCall("sky_now", {}),)))
    right.act(Turn(calls=(ToolCall("sky_now", dict(city="Riga")),)))
    for episode in (bare, right): episode.act(Turn("Done."))
    assert not bare.outcome().success and right.outcome().success
    assert env.feedback(bare, "observed") == "You stopped before the request was done. sky_now needs city. 0 of your calls were right."


def test_the_check_holds_for_both(dialogues, queries):
    for env in (make(form="apibank", files=dialogues), make(form="toolbench", files=[queries])):
        assert isinstance(env, Environment)
        report = check(env, "all", 5, 0, 50)
        by_name = {row.policy: row for row in report.policies}
        assert report.ok, [f for f in report.findings if f.holds is False]
        assert by_name["oracle"].success == 1.0 and by_name["no_op"].success == 0.0


def test_observed_feedback_holds_no_recorded_value(dialogues):
    env = make(form="apibank", files=dialogues)
    task = env.tasks("all")[0]
    for calls in ([], [("gettoken", dict(user="ann"))], [("bookroom", dict(token="a1b2c3", day="Monday"))]):
        episode = env.open(task)
        for name, arguments in calls: episode.act(Turn(calls=(ToolCall(name, arguments),)))
        while not episode.done: episode.act(Turn("Done."))
        assert not any(secret in recorded_feedback(episode, d) for d in DETAILS[:2] for secret in env.secrets(task))
    assert function_name("Weather API / Get (v2)") == "weather_api_get_v2"
