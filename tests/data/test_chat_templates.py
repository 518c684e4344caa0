"""Templates with the traits of published ones: Qwen3, DeepSeek-R1, Nemotron, Phi-3, gpt-oss, Mistral."""

import datetime

import numpy as np
import pytest

import rayk
from rayk.data.chat_template import ChatTemplate
from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError
from tests.tiny import CHAT_TEMPLATE, END, EOS, tiny_tokenizer

PLAIN = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "24 clips"},
    {"role": "user", "content": "and in May?"},
    {"role": "assistant", "content": "72"},
]
THOUGHTS = [
    PLAIN[0],
    {"role": "assistant", "content": "<think>\nlet me see\n</think>\n\n24 clips"},
    PLAIN[2],
    {"role": "assistant", "content": "<think>\nhalf\n</think>\n\n72"},
]

# Earlier answers lose their thought; the last one without a thought gets an empty one.
QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set thought = m.reasoning_content or '' %}{%- set answer = m.content %}"
    "{%- if '</think>' in m.content %}{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{%- endif %}"
    "{{- '<|assistant|>\\n' }}"
    "{%- if loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}{{- answer + '<|end|>\\n' }}"
    "{%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# The generation prompt opens a thought, and the template drops all thoughts.
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# The same, but thoughts are kept and can be switched off.
NEMOTRON = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}final:{% endif %}{{ m.content }}"
    "{{ '<eos>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.content is not none %}{{ m.content }}{% else %}{% for c in m.tool_calls %}"
    "{{ 'call ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""As DeepSeek-V3's: calls are printed only where the content is none, and their arguments must be text."""

SCHEMA = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"role": "user", "content": "the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"place": "Graz"}}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


def encoder_of(template, *, counts_template_text=False, tokenizer=None, date=None, **kwargs):
    tokenizer = tokenizer or tiny_tokenizer(chat_template=template)
    return TextEncoder(tokenizer, ChatTemplate(tokenizer, template, kwargs, date), counts_template_text)


def pieces(encoder, tokens):
    """The decoded runs of uncounted and counted tokens, beginning with uncounted ones."""
    counted, ids = tokens.counted(), np.array(tokens.input_ids)
    edges = np.flatnonzero(np.diff(counted.astype(int))) + 1
    return [encoder.tokenizer.decode(part) for part in np.split(ids, edges)]


def test_an_empty_think_block_of_the_template_is_not_counted():
    encoder = encoder_of(QWEN3)
    tokens = encoder.chat(PLAIN[:2], [1], "row 1")
    before = "<|user|>\nhow many?<|end|>\n<|assistant|>\n"
    assert pieces(encoder, tokens) == [before + "<think>\n\n</think>\n\n", "24 clips" + END]
    assert tokens.input_ids[: tokens.prompt_tokens()] == encoder.chat_prompt(PLAIN[:1], "row 1")
    counting = encoder_of(QWEN3, counts_template_text=True)
    assert pieces(counting, counting.chat(PLAIN[:2], [1], "row 1"))[1] == "<think>\n\n</think>\n\n24 clips" + END
    (batch,) = rayk.make_batches(
        [{"messages": PLAIN[:2]}], encoder.tokenizer, 1, chat_template=True, count_template_text=True
    )
    assert encoder.tokenizer.decode(batch.targets).startswith("<think>\n\n</think>")


def test_switched_off_thinking_is_part_of_the_prompt():
    encoder = encoder_of(QWEN3, enable_thinking=False)
    tokens = encoder.chat(PLAIN[:2], [1], "row 1")
    assert pieces(encoder, tokens)[1] == "24 clips" + END
    prompt = encoder.tokenizer.decode(tokens.input_ids[: tokens.prompt_tokens()])
    assert prompt.endswith("<|assistant|>\n<think>\n\n</think>\n\n")
    with pytest.raises(InputError, match="^row 1: .* set data.chat_template_kwargs to {enable_thinking: true}"):
        encoder.chat(THOUGHTS[:2], [1], "row 1")


@pytest.mark.parametrize(
    "answer", [THOUGHTS[1], {"role": "assistant", "content": "24 clips", "reasoning_content": "let me see"}]
)
def test_a_thought_that_the_row_brings_is_counted(answer):
    encoder = encoder_of(QWEN3)
    tokens = encoder.chat([PLAIN[0], answer], [1], "row 1")
    assert pieces(encoder, tokens)[1] == "<think>\nlet me see\n</think>\n\n24 clips" + END


def test_turns_that_are_printed_differently_later_become_examples_of_their_own():
    encoder = encoder_of(QWEN3)
    first, second = encoder.chats(THOUGHTS, [1, 3], "row 1")
    assert pieces(encoder, first)[1] == "<think>\nlet me see\n</think>\n\n24 clips" + END
    assert pieces(encoder, second)[1] == "<think>\nhalf\n</think>\n\n72" + END
    for turn, tokens in ((1, first), (3, second)):  # what the model reads at inference
        assert tokens.input_ids[: tokens.prompt_tokens()] == encoder.chat_prompt(THOUGHTS[:turn], "row 1")
    assert second.limited_prompt == first.prompt_tokens()
    (batch,) = rayk.make_batches([{"messages": THOUGHTS}], encoder.tokenizer, 8, train_on="all")
    assert [sequence.input_ids.tolist() for sequence in batch.sequences] == [first.input_ids, second.input_ids]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PHI3])
def test_turns_that_stay_the_same_are_one_example(template):
    encoder = encoder_of(template)
    (tokens,) = encoder.chats(PLAIN, [1, 3], "row 1")
    assert pieces(encoder, tokens)[1::2] == ["24 clips" + END, "72" + END]


def test_ends_of_the_last_turn_only_make_examples_of_their_own():
    encoder = encoder_of(GPT_OSS)
    first, second = encoder.chats(PLAIN, [1, 3], "row 1")
    assert pieces(encoder, first)[1] == "24 clips" + EOS
    assert pieces(encoder, second) == [
        "<|user|>how many?<|end|><|assistant|>final:24 clips<|end|><|user|>and in May?<|end|><|assistant|>final:",
        "72" + EOS,
    ]


def test_a_thought_continues_a_generation_prompt_that_opens_it(caplog):
    encoder = encoder_of(R1)
    tokens = encoder.chat(THOUGHTS[:2], [1], "row 1")
    assert pieces(encoder, tokens) == [
        "<|user|>how many?<|end|><|assistant|><think>\n",
        "let me see\n</think>\n\n24 clips" + END,
    ]
    in_field = [PLAIN[0], {"role": "assistant", "content": "24 clips", "reasoning_content": "let me see"}]
    assert encoder.chat(in_field, [1], "row 1").input_ids == tokens.input_ids
    assert not caplog.records
    assert pieces(encoder, encoder.chat(PLAIN[:2], [1], "row 1"))[1] == "24 clips" + END
    assert "row 1: the chat template's generation prompt opens a thought" in caplog.text


def test_an_answer_without_a_thought_after_an_open_one_is_refused_where_thinking_can_be_switched_off():
    with pytest.raises(InputError, match=r"row 1: .* set data.chat_template_kwargs to {enable_thinking: false}"):
        encoder_of(NEMOTRON).chat(PLAIN[:2], [1], "row 1")
    encoder = encoder_of(NEMOTRON, enable_thinking=False)
    assert pieces(encoder, encoder.chat(PLAIN[:2], [1], "row 1"))[1] == "24 clips" + END


def test_a_dropped_thought_is_refused():
    dropping = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(InputError, match="row 1: the chat template leaves out the thought"):
        encoder_of(dropping).chat(THOUGHTS[:2], [1], "row 1")
    with pytest.raises(InputError, match="row 1: the chat template leaves out the thought"):
        encoder_of(CHAT_TEMPLATE).chat(
            [PLAIN[0], {"role": "assistant", "content": "24", "thinking": "let me see"}], [1], "row 1"
        )


def test_generation_marks_decide_what_is_counted():
    marked = QWEN3.replace("{%- if loop.last %}{{- '<think>", "{%- generation %}{{- '<think>").replace(
        "{%- endif %}{{- answer + '<|end|>\\n' }}", "{{- answer + '<|end|>' }}{%- endgeneration %}{{- '\\n' }}"
    )
    encoder = encoder_of(marked)
    (tokens,) = encoder.chats(PLAIN, [1, 3], "row 1")
    assert pieces(encoder, tokens)[1::2] == [
        "<think>\n\n</think>\n\n24 clips" + END,
        "<think>\n\n</think>\n\n72" + END,
    ]
    whole = encoder.tokenizer.apply_chat_template(
        PLAIN, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    length = len(tokens.input_ids)
    assert whole["input_ids"][:length] == tokens.input_ids
    assert whole["assistant_masks"][:length] == tokens.counted().astype(int).tolist()


def test_tools_are_printed_and_their_calls_are_counted():
    encoder = encoder_of(TOOLS)
    (tokens,) = encoder.chats(CALLS, [1, 3], "row 1", SCHEMA)
    found = pieces(encoder, tokens)
    assert found[0].startswith('tools: [{"type": "function", "function": {"name": "weather"')
    assert found[1::2] == ['call weather {"place": "Graz"}' + END, "It is sunny." + END]
    assert "sunny" in found[2]


@pytest.mark.parametrize(
    ("messages", "tools", "sentence"),
    [
        (CALLS[:1] + CALLS[3:], SCHEMA, "does not print the row's tools"),
        (CALLS, None, "does not print calls of tools"),
        ([{"role": "system", "content": "be brief"}, *PLAIN], None, "leaves out messages of role system"),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages, tools, sentence):
    with pytest.raises(InputError, match=f"^row 1: the chat template {sentence}"):
        encoder_of(PHI3).chats(messages, [len(messages) - 1], "row 1", tools)


def test_a_turn_that_renders_to_nothing_is_refused():
    silent = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] if message['role'] == 'user' else '' }}"
    )
    with pytest.raises(InputError, match="row 1: the chat template prints nothing for the assistant's message 2"):
        encoder_of(silent).chat(PLAIN[:2], [1], "row 1")


@pytest.mark.parametrize("end", [END, EOS, END + "\n", END + EOS])
def test_an_end_mark_in_the_content_is_not_doubled(end):
    encoder = encoder_of(CHAT_TEMPLATE)
    plain = encoder.chat(PLAIN, [3], "row 1")
    ended = [message | {"content": message["content"] + end * (i % 2)} for i, message in enumerate(PLAIN)]
    assert encoder.chat(ended, [3], "row 1") == plain


def test_an_end_mark_of_several_tokens_is_replaced_by_eos():
    tokenizer = tiny_tokenizer(chat_template=None)
    (batch,) = rayk.make_batches(
        [{"messages": PLAIN}], tokenizer, 8, chat_template="chatml", train_on="all", max_tokens=4096
    )
    first, second = batch.sequences
    assert tokenizer.decode(first.targets) == "24 clips" + EOS and tokenizer.decode(second.targets) == "72" + EOS
    assert "24 clips<|im_end|>\n<|im_start|>user" in tokenizer.decode(second.input_ids)


def test_a_template_with_todays_date_prints_the_given_one():
    encoder = encoder_of(DATED, date=datetime.date(2025, 3, 9))
    assert encoder.tokenizer.decode(encoder.chat_prompt(PLAIN[:1], "row 1")).startswith("09 Mar 2025\n<|user|>")
    today = encoder_of(DATED)
    assert today.chat_template.render(PLAIN, "row 1").startswith(f"{datetime.date.today():%d %b %Y}\n")


def test_the_prompt_limit_applies_to_the_text_before_the_first_trained_turn():
    tokenizer = tiny_tokenizer()
    limit = len(tokenizer.apply_chat_template(PLAIN[:1], add_generation_prompt=True)["input_ids"])
    row, settings = {"messages": PLAIN}, {"train_on": "all", "max_prompt_tokens": limit}
    (batch,) = rayk.make_batches([row], tokenizer, 1, **settings)
    assert tokenizer.decode(batch.targets) == f"24 clips{END}72{END}"
    with pytest.raises(InputError, match=f"row 1 has a prompt of {limit} tokens, more than max_prompt_tokens"):
        rayk.make_batches([row], tokenizer, 1, **settings | {"max_prompt_tokens": limit - 1})
    with pytest.raises(InputError, match="row 1 has a prompt of"):
        rayk.make_batches([row], tokenizer, 1, max_prompt_tokens=limit)
