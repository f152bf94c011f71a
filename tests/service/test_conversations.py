"""Conversations: the next message, as the task's layout and plain model give it, and a reason for what is refused."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from served import LIMITS, SIZES, alone, client, saved, words
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.service import language, layouts
from fusion_bench_didi.service.limits import Refused
from fusion_bench_didi.service.messages import ClassifyRequest
from fusion_bench_didi.service.opening import open_runner

PATH = "/v1/chat/completions"
#: begins as the tokenizer itself begins its texts
LAYOUT = "[EOS] {% for m in messages %}{{ {'user': 'w50', 'assistant': 'w51', 'system': 'w52'}[m.role] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w51{% endif %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System messages are not for me') }}{% endif %}{{ messages[0].content.upper }} w1"
TALK = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4"},
    {"role": "user", "content": "w5"},
]


def talking(layout: str | None):
    tokenizer = words()
    tokenizer.chat_template = layout
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="[EOS] $A", special_tokens=[("[EOS]", 2)])  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """Two tasks that converse, each in its own layout, and one that does not."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("talking")
    own = {"one": talking(LAYOUT), "two": talking(STRICT)}
    for task, tokenizer in own.items():
        tokenizer.save_pretrained(place / task)
    parents = {task: str(place / task) for task in own}
    config = LlamaConfig(vocab_size=63, eos_token_id=2, max_position_embeddings=64, **SIZES)  # fmt: skip
    return saved(LlamaForCausalLM(config), words(), place, parents=parents)


@pytest.fixture(scope="module")
def runner(merged):
    return open_runner(merged, limits=LIMITS)


@pytest.fixture(scope="module")
def ask(runner):
    with client(runner) as found:
        yield found


def said(runner, messages, tokens: int) -> str:
    """What the plain model of the first task says next."""
    ids = talking(LAYOUT).apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]  # fmt: skip
    out = runner.model.materialize("one").eval().generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip
    return words().decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_next_message_is_the_plain_models(ask, runner):
    body = {"model": "one", "messages": TALK, "max_tokens": 5, "temperature": 0}
    found = ask.post(PATH, json=body).json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": said(runner, TALK, 5)}
    assert choice["finish_reason"] in ("stop", "length") and choice["index"] == 0
    assert found["object"] == "chat.completion" and found["model"] == "one"
    assert found["id"].startswith("chatcmpl-")
    used = found["usage"]  # one token begins it, not two
    assert used["prompt_tokens"] == 11 and used["completion_tokens"] <= 5
    assert used["total_tokens"] == 11 + used["completion_tokens"]


def test_conversations_and_prompts_are_one_batch(merged):
    """Texts of both kinds, sent at the same time, are answered as by themselves."""
    limits = replace(LIMITS, wait_ms=2000)
    runner, sizes = open_runner(merged, limits=limits), []
    run = type(runner).__call__
    seen = type("Seen", (type(runner),), {"__call__": lambda self, rows: sizes.append(len(rows)) or run(self, rows)})  # fmt: skip
    runner.__class__ = seen
    asked = [
        (PATH, {"model": "one", "messages": TALK[1:], "max_completion_tokens": 4}),
        ("/v1/completions", {"model": "three", "prompt": "w7", "max_tokens": 3}),
        ("/v1/completions", {"model": "one", "prompt": "w8 w9", "max_tokens": 4}),
        (PATH, {"model": "one", "messages": TALK[3:], "max_tokens": 2}),
    ]
    with client(runner, limits) as ask, ThreadPoolExecutor(4) as threads:
        sent = threads.map(lambda one: ask.post(one[0], json=one[1]).json(), asked)
        first, second, third, fourth = (one["choices"][0] for one in sent)
    assert first["message"]["content"] == said(runner, TALK[1:], 4)
    assert fourth["message"]["content"] == said(runner, TALK[3:], 2)
    assert second["text"] == alone(runner, "three", "w7", 3, words())
    assert third["text"] == alone(runner, "one", "w8 w9", 4, talking(LAYOUT))
    assert sizes == [4]


def test_parts_of_text_are_its_lines_and_as_much_is_said_as_has_room(ask, runner):
    parts = [{"type": "text", "text": word} for word in ("w2", "w3")]
    body = {"model": "one", "messages": [{"role": "user", "content": parts}]}
    found = ask.post(PATH, json=body).json()
    talk = [{"role": "user", "content": "w2\nw3"}]
    assert found["choices"][0]["message"]["content"] == said(runner, talk, LIMITS.tokens)  # fmt: skip
    assert runner.turn("one", talk, None).tokens == LIMITS.tokens
    roomy = type(runner)(runner.model, runner.tokenizers, replace(LIMITS, tokens=256, prompt_tokens=1024))  # fmt: skip
    assert roomy.turn("one", talk, None).tokens == 64 - 5


def message(**change) -> dict:
    return {"messages": [*TALK[1:], {"role": "user", "content": "w1", **change}]}


@pytest.mark.parametrize(
    "told, change",
    [
        ("messages is []; expected a list of messages", {"messages": []}),
        ('messages is "w1"; expected a list of messages', {"messages": "w1"}),
        ('messages[0] is "w1"; expected an object of role', {"messages": ["w1"]}),
        ('messages[3].role is "tool"; expected one of system', message(role="tool")),
        ("messages[3].role is []; expected one of system", message(role=[])),
        ("messages[3].content is null; expected a text", message(content=None)),
        ('messages[3].content is "\\ud800"; expected a text', message(content="\ud800")),  # fmt: skip
        ("messages[3] is", message(name="me")),
        ('messages[3].content[1] is {"type": "image_url"', message(content=[{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {}}])),
        ("texts alone are read", message(content=["w1"])),
        ("temperature is 1; expected 0", {"temperature": 1}),
        ("n is 2; expected 1", {"n": 2}),
        ("stream is true; expected false", {"stream": True}),
        ("tools is not known; a request holds model", {"tools": []}),
        ("9 tokens are asked for, at most 8", {"max_completion_tokens": 9}),
        ("Give either max_completion_tokens, or max_tokens", {"max_tokens": 2, "max_completion_tokens": 2}),
        ("26 tokens, expected 1 to 12 before 1 more", {"messages": [{"role": "user", "content": "w1 " * 23}]}),
        ("no layout of conversations (chat_template); send a prompt to /v1/completions", {"model": "three"}),
        ("System messages are not for me", {"model": "two"}),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_why(ask, told, change):
    body = json.dumps({"model": "one", "messages": TALK, **change})
    kind = {"content-type": "application/json"}
    answer = ask.post(PATH, content=body, headers=kind)
    error = answer.json()["error"]
    assert answer.status_code == 400 and told in error["message"]
    assert len(error["message"].split(". ")) == 1


def test_a_layout_of_its_own_goes_with_the_base_models_tokenizer(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/chat_template.jinja").write_text(LAYOUT)
    config = LlamaConfig(vocab_size=63, eos_token_id=2, **SIZES)
    place = saved(LlamaForCausalLM(config), words(), tmp_path, parents={"one": str(tmp_path / "one")})  # fmt: skip
    runner = open_runner(place, limits=LIMITS)
    (found,) = runner([runner.turn("one", TALK, 5)])
    assert found.text == said(runner, TALK, 5)


def test_missing_fields_are_named(ask):
    told = ask.post(PATH, json={}).json()["error"]["message"]
    assert "model is missing" in told and "messages is missing" in told


@pytest.mark.parametrize(
    "change",
    [
        {"stop": None, "tools": None, "seed": None, "stream": None, "temperature": None},
        {"top_p": 1, "presence_penalty": 0.0, "stop": [], "logprobs": False, "n": None},
        {"top_p": 1.0, "response_format": {"type": "text"}, "stream_options": None},
        {"messages": [{**TALK[0], "role": "developer", "name": None}, *({**m, "refusal": None} for m in TALK[1:])]},
    ],
)  # fmt: skip
def test_fields_that_change_nothing_are_taken(ask, runner, change):
    """Clients send what they have no value for as null, and messages as they were answered."""
    body = {"model": "one", "messages": TALK, "max_tokens": 4, **change}
    found = ask.post(PATH, json=body).json()
    assert found["choices"][0]["message"]["content"] == said(runner, TALK, 4)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"


@pytest.mark.parametrize(
    "layout, seconds, told",
    [
        (LOOP, 0.2, "it takes longer than 0.2 s"),
        ("{{ 'w1 ' * 2000000 }}", 60, "a text of 6000000 letters"),
        ("{{ '\ud800' }}", 60, "refuses these"),
    ],
)
def test_layouts_are_bounded(runner, monkeypatch, layout, seconds, told):
    """One that loops held its thread for ever, and the service at its end."""
    bounded = partial(layouts.laid_out, seconds=seconds)
    monkeypatch.setattr(language, "laid_out", bounded)
    monkeypatch.setattr(runner.tokenizers["one"], "chat_template", layout)
    trace = sys.gettrace()
    with pytest.raises(Refused, match=told):
        runner.turn("one", TALK, 2)
    assert sys.gettrace() is trace


def test_layouts_reach_nothing_of_this_machine(tmp_path):
    """They run in transformers' sandbox; what they may not do is a refusal."""
    torch.manual_seed(0)
    hostile = talking("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    hostile.save_pretrained(tmp_path / "one")
    config = LlamaConfig(vocab_size=63, **SIZES)
    place = saved(LlamaForCausalLM(config), words(), tmp_path, parents={"one": str(tmp_path / "one")})  # fmt: skip
    with client(open_runner(place, limits=LIMITS)) as ask:
        answer = ask.post(PATH, json={"model": "one", "messages": TALK})
        assert answer.status_code == 400 and "unsafe" in answer.json()["error"]["message"]  # fmt: skip


def test_what_is_of_texts_is_refused_where_classes_are_asked_for():
    given = {"model": "one", "input": "w1"}
    assert ClassifyRequest(**given, user=None).input == "w1"
    with pytest.raises(ValidationError, match="top_p"):
        ClassifyRequest(**given, top_p=1)
