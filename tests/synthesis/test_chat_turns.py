"""The text around a user's message is found in templates of all kinds, or an error says why not."""

import pytest

from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError
from rayk.synthesis.chat_turns import find_chat_turns
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
VICUNA = (
    "A chat. {% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
SPECIAL = [
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
    "<end_of_turn>",
]  # fmt: skip


def encoder_of(template):
    tokenizer = tiny_tokenizer(chat_template=template, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return TextEncoder(tokenizer)


def turns(template, system=None):
    found = find_chat_turns(encoder_of(template), system, "teacher 'big'")
    return found.user_begins, found.user_ends, found.assistant_ends


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA_3, ("<bos><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>")),
        (
            QWEN_2_5,
            ("<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n", "<|im_end|>", "<|im_end|>"),
        ),
        (GEMMA_2, ("<bos><start_of_turn>user\n", "<end_of_turn>", "<end_of_turn>")),
        (MISTRAL, ("<bos>[INST]", "[/INST]", "<eos>")),
        (VICUNA, ("A chat. USER:", "ASSISTANT:", "")),
        (CHAT_TEMPLATE, ("<|user|>\n", "<|end|>", "<|end|>")),
    ],
    ids=["llama-3", "qwen2.5", "gemma-2", "mistral", "vicuna", "tiny"],
)  # fmt: skip
def test_turns_of_known_templates(template, expected):
    assert turns(template) == expected


def test_the_beginning_has_the_tokens_that_precede_any_text():
    for template in (LLAMA_3, QWEN_2_5, GEMMA_2, MISTRAL, VICUNA, CHAT_TEMPLATE):
        encoder = encoder_of(template)
        fed = encoder.encode([find_chat_turns(encoder, None, "it").user_begins])[0]
        for text in ("Question: what is it?", "the cat", "72", "Über"):
            assert encoder.chat_prompt([{"role": "user", "content": text}], "it")[: len(fed)] == fed


def test_a_system_prompt_comes_first():
    begun = "<bos><|start_header_id|>system<|end_header_id|>\n\nOn chess.<|eot_id|>"
    assert turns(LLAMA_3, "On chess.")[0] == f"{begun}<|start_header_id|>user<|end_header_id|>\n\n"
    assert turns(QWEN_2_5, "On chess.")[0] == "<|im_start|>system\nOn chess.<|im_end|>\n<|im_start|>user\n"


TWICE = "{% for m in messages %}<u>{{ m['content'] }}|{{ m['content'] }}<e>{% endfor %}"
COUNTED = "{% for m in messages %}<u {{ m['content'][0] }}>{{ m['content'] }}<e>{% endfor %}"
WITHOUT_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<u>{{ m['content'] }}<e>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "system", "said"),
    [
        (None, None, "^teacher 'big' has no chat template in its tokenizer, which magpie .* synthesis.tokenizer"),
        (TWICE, None, "contains the user's text 2 times instead of once"),
        ("{% for m in messages %}<u>{{ m['content'] | upper }}<e>{% endfor %}", None, "user's text 0 times"),
        (COUNTED, None, "depends on that text"),
        ("{% for m in messages %}{{ m['content'] }}<e>{% endfor %}", None, "has no text before a user's message"),
        ("{% for m in messages %}<u>{{ m['content'] }}\n{% endfor %}", None, "has no text after a user's message"),
        (GEMMA_2, "On chess.", "with synthesis.system: .* fails on these messages: System role not supported"),
        (WITHOUT_SYSTEM, "On chess.", "ignores a system prompt; remove synthesis.system"),
    ],
)  # fmt: skip
def test_one_sentence_says_why_a_template_cannot_be_used(template, system, said):
    with pytest.raises(InputError, match=said):
        turns(template, system)
