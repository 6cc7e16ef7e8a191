"""OpenAI's shapes: read as its clients write them, refused with the field's name and never its content."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.chat_requests import Completion, RequestError, read_request

SECRET = "nobody-may-read-this"
GIVEN = {
    "prompt_tokens": 5,
    "system": {"is": "base", "why": "because"},
    "records": [{"id": "ab", "response": SECRET}],
    "profile": [SECRET],
    "dropped_turns": 1,
    "cut": False,
}


def body(**changes):
    values = {"model": "base", "messages": [{"role": "user", "content": "hello"}]} | changes
    return json.dumps(values).encode()


def test_what_clients_send_is_read():
    found = read_request(
        body(
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "assistant", "content": None, "tool_calls": []},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "name": "x",
                },
            ],
            max_completion_tokens=7,
            temperature=0,
            top_p=0.5,
            seed=-1,
            stop="END",
            stream=True,
            stream_options={"include_usage": True},
            n=1,
            tools=[],
            logprobs=None,
            user="me",
            something_new={"x": 1},
        )
    )
    assert found.turns == (("system", "be brief"), ("assistant", ""), ("user", "ab"))
    assert found.sampling == {
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": (1 << 63) - 1,
        "stop": ["END"],
    }
    assert found.stream
    assert found.usage
    assert "hello" not in repr(read_request(body()))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [SECRET]}, "messages[0]"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": {"text": SECRET}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": SECRET}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": SECRET}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 0.5}, "seed"),
        ({"stop": [SECRET, 3]}, "stop"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_cannot_be_answered_names_the_field(changes, field):
    with pytest.raises(RequestError) as refused:
        read_request(body(**changes))
    shape = refused.value.to_json()["error"]
    assert shape["param"] == field
    assert field in shape["message"]
    assert SECRET not in json.dumps(shape)
    assert refused.value.status == 400


JSON = st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda found: json.dumps(found).encode())


@given(st.binary(max_size=200) | JSON)
def test_whatever_comes_is_read_or_refused(content):
    with pytest.raises(RequestError):
        read_request(content)


def test_pieces_add_up_to_the_whole_answer():
    answer = Completion("personal", GIVEN)
    chunks = [answer.opening(), answer.add({"text": "Hel", "tokens": 1})]
    chunks.append(answer.add({"text": "lo", "tokens": 2, "finish": "stop", "done": True}))
    whole = answer.whole()
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello"
    assert whole["choices"][0]["message"]["content"] == "Hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert answer.counts()["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in (*chunks, whole)}) == 1
    assert SECRET not in json.dumps(whole)  # records are named, not shown
