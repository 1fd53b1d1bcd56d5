"""Tools in the formats of Llama 3.1's and SmolLM2's models: what the template gets, and what an answer becomes."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_engine.errors import InputError
from llama_engine.tokenizer import ChatTokenizer
from llm_demo.messages import Message, Tool
from llm_demo.tools import ToolFormat
from tests.llm_demo.test_endings import Fake, chat, ids
from tests.tokenizers_small import CHATML, LLAMA2, SHAPES

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Say <|eot_id|>", "parameters": PARAMETERS}}
ASKED = [{"role": "user", "content": "Weather in Rome?"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TURNS = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny<|eot_id|>"},
]
# Llama 3.1's in small: tools in the first message of the user, one call a turn, what it gave under another role
LLAMA31 = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "{% if 'tool_calls' in m %}{% set call = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture
def engine(tiny_engine, tmp_path, edit_json):
    directory = tmp_path / "engine"
    shutil.copytree(tiny_engine, directory)
    SHAPES["llama3"](directory)
    info = json.loads((directory / "engine.json").read_text())
    longer, endless = info["engine"] | {"max_seq_len": 2048}, info["model"] | {"eos_token_ids": []}
    edit_json(directory / "engine.json", {"engine": longer, "model": endless | {"max_position_embeddings": 2048}})
    (directory / "chat_template.jinja").write_text(LLAMA31)
    return directory


def test_a_template_that_knows_tools_gets_them_and_no_control_token_comes_with_them(engine):
    fake = Fake(ids(engine, "yes"))
    chat(engine, fake, "{}", messages=TURNS, tools=[TOOL])
    oracle = AutoTokenizer.from_pretrained(engine)
    harmless, tool = json.loads(json.dumps([TURNS, TOOL]).replace("<|eot_id|>", "x"))
    harmless[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Rome"}
    expected = oracle.apply_chat_template(harmless, tools=[tool], add_generation_prompt=True)["input_ids"]
    special = set(oracle.all_special_ids)
    assert [i for i in fake.asked["prompt"] if i in special] == [i for i in expected if i in special]
    text = oracle.apply_chat_template(harmless, tools=[tool], add_generation_prompt=True, tokenize=False)
    assert (
        oracle.decode(fake.asked["prompt"]).replace("Say <|eot_id|>", "Say x").replace("sunny<|eot_id|>", "sunnyx")
        == text
    )


def test_chatml_gets_the_tools_in_its_system_message():
    rows, given = ToolFormat(CHATML, [Tool.model_validate(TOOL)]).for_template(
        [Message.model_validate(m) for m in [{"role": "system", "content": "Be brief."}, *TURNS]]
    )
    assert given is None
    assert rows[0]["content"].startswith("Be brief.\n\n")
    assert json.dumps([TOOL]) in rows[0]["content"]
    assert rows[2] == {
        "role": "assistant",
        "content": '<tool_call>[{"name": "weather", "arguments": {"city": "Rome"}}]</tool_call>',
    }
    rows, _ = ToolFormat(CHATML, [Tool.model_validate(TOOL)]).for_template([Message.model_validate(ASKED[0])])
    assert [row["role"] for row in rows] == ["system", "user"]


def test_a_template_without_a_format_for_tools_refuses_them():
    with pytest.raises(InputError, match="tools are not supported by this model"):
        ToolFormat(LLAMA2, [Tool.model_validate(TOOL)])


ONE, TWO = {"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather", "parameters": {"city": "Oslo"}}


@pytest.mark.parametrize(
    ("said", "cities"),
    [
        (json.dumps(TWO), ["Oslo"]),
        (f"<tool_call>[{json.dumps(ONE)}, {json.dumps(TWO)}]</tool_call>", ["Rome", "Oslo"]),
        (f"<tool_call>\n{json.dumps(ONE)}\n</tool_call>\n<tool_call>{json.dumps(TWO)}</tool_call>", ["Rome", "Oslo"]),
        (f"{json.dumps(ONE)}; {json.dumps(TWO)}", ["Rome", "Oslo"]),
        (f" <tool_call>[{json.dumps(ONE)}]", ["Rome"]),  # its end was not said
        ('{"name": "other", "arguments": {}}', []),
        ('{"name": "weather", "arguments": "Rome"}', []),
        (json.dumps(ONE) + " is what I would call", []),
        ("{" * 5000, []),
        ("<tool_call>", []),
        ("It is sunny.", []),
    ],
)
def test_an_answer_becomes_calls_or_stays_text(said, cities):
    tools = ToolFormat(CHATML, [Tool.model_validate(TOOL)])
    calls = tools.calls(said)
    assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == cities
    assert len({call["id"] for call in calls}) == len(calls)
    if cities:
        assert all(tools.may_call(said[:n]) for n in range(len(said)))
    assert len(ToolFormat(CHATML, [Tool.model_validate(TOOL)], parallel=False).calls(said)) == min(1, len(cities))


@given(st.text(st.sampled_from('{}[]<>/"tool_call:,; ')))
def test_no_answer_breaks_the_parser(said):
    assert ToolFormat(CHATML, [Tool.model_validate(TOOL)]).calls(said) == []


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_calls_reach_the_client_and_words_stay_words(engine, choice):
    said = json.dumps(TWO)
    asked = {"messages": ASKED, "tools": [TOOL], "tool_choice": choice}
    [answer] = chat(engine, Fake(*([token] for token in ids(engine, said))), "{}", **asked)["choices"]
    if choice == "none":
        assert answer["message"]["content"] == said
        assert answer["finish_reason"] == "stop"
    else:
        assert answer["message"]["content"] is None
        [call] = answer["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
        assert answer["finish_reason"] == "tool_calls"
    [answer] = chat(engine, Fake(ids(engine, "{ sunny")), "{}", **asked)["choices"]
    assert answer["message"]["content"] == "{ sunny"
    assert answer["finish_reason"] == "stop"


def test_template_options_reach_the_template_and_nothing_else(engine):
    (engine / "chat_template.jinja").write_text(
        "{{ messages[0].content }} {{ date }}{% if not add_generation_prompt %} no{% endif %}"
    )
    fake = Fake([])
    chat(engine, fake, "{}", messages=ASKED, chat_template_kwargs={"date": "today"}, add_generation_prompt=False)
    assert ChatTokenizer(engine).decode(fake.asked["prompt"]) == "Weather in Rome? today no"
