"""Small chat templates that cover the constructs of public ones, and conversations that are hard to render exactly.

The special tokens are `<s>`, `</s>`, `<|im_start|>` and `<|im_end|>`. The first two are the roles `bos_token` and
`eos_token`.
"""

from simpo_pipeline.data.messages import Message

_TURNS = "{% for m in messages %}"
_END = "{% endfor %}"
_CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML = _TURNS + _CHATML_TURN + _END + _CHATML_PROMPT
_INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ANSWER }}{% endif %}{% endfor %}"
)
_NO_THOUGHTS = (
    "{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)

TEMPLATES = {
    "chatml": _CHATML,
    "chatml with BOS": "{{ bos_token }}" + _CHATML,
    "chatml in blocks": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    "chatml with a default system turn": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        + _CHATML
    ),
    "chatml that always adds the prompt": _TURNS + _CHATML_TURN + _END + "{{ '<|im_start|>assistant\n' }}",
    "chatml that never adds the prompt": _TURNS + _CHATML_TURN + _END,
    "chatml without line breaks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    ),
    "trimmed content": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    ),
    "trimmed with strip()": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content.strip() ~ '<|im_end|>\n' }}{% endfor %}"
        + _CHATML_PROMPT
    ),
    "trimmed at the right": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content.rstrip() ~ '<|im_end|>\n' }}{% endfor %}"
        + _CHATML_PROMPT
    ),
    "instructions with EOS": "{{ bos_token }}" + _INST.replace("ANSWER", "' ' + m['content'] + eos_token"),
    "instructions with a blank before EOS": _INST.replace("ANSWER", "' ' + m['content'] + ' </s>'"),
    "instructions without blank": _INST.replace("ANSWER", "m['content'] + eos_token"),
    "instructions that end in a blank": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST] ' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "instructions with the system turn inside": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "system turn before the last question": (
        "{% set ns = namespace(system='', last=-1) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' }}{% if loop.index0 == ns.last and ns.system %}{{ ns.system + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "no system turn allowed": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + _CHATML
    ),
    "turns must alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        + _CHATML_TURN
        + _END
        + _CHATML_PROMPT
    ),
    "system turn left out": (
        "{% for m in messages %}{% if m.role != 'system' %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT
    ),
    "reasoning removed": (
        _TURNS + _NO_THOUGHTS + "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}" + _END + _CHATML_PROMPT
    ),
    "reasoning of earlier turns removed": (
        "{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'assistant' and not loop.last and '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}" + _CHATML_PROMPT
    ),
    "prompt that opens the reasoning": (
        _TURNS
        + _CHATML_TURN
        + _END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    "prompt with an empty reasoning": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    "tools, if there are any": (
        "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT
    ),
    "documents, if there are any": (
        "{% if documents %}{% for d in documents %}{{ d.text }}{% endfor %}{% endif %}" + _CHATML
    ),
    "content as JSON": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | tojson + '<|im_end|>\n' }}{% endfor %}"
        + _CHATML_PROMPT
    ),
    "message as JSON": _TURNS + "{{ m | tojson }}{{ '<|im_end|>\n' }}" + _END + _CHATML_PROMPT,
    "date": "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + _CHATML,
    "date in a system turn, if the function is there": (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%Y-%m-%d') %}{%- else %}"
        "{%- set day = '26 Jul 2024' %}{%- endif %}{{- '<|im_start|>system\nToday Date: ' + day + '<|im_end|>\n' }}"
        + _CHATML
    ),
    "macro": (
        "{% macro turn(role, content) %}{{ '<|im_start|>' + role + '\n' + content + '<|im_end|>\n' }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}" + _CHATML_PROMPT
    ),
    "macro with a default": (
        "{%- macro text(m, trim=false) -%}{{ m.content | trim if trim else m.content }}{%- endmacro -%}"
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ text(m) }}<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    ),
    "names of roles mapped": (
        "{% set names = {'user': 'Human', 'assistant': 'AI', 'system': 'Note'} %}"
        "{% for m in messages %}{{ names[m.role] + ': ' + m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}AI: {% endif %}"
    ),
    "names of roles without EOS": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "headings": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
        "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}"
        + _CHATML_TURN
        + "{% if loop.index > 40 %}{% break %}{% endif %}{% endfor %}"
        + _CHATML_PROMPT
    ),
    "generation blocks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}" + _CHATML_TURN + "{% endif %}"
        "{% endfor %}" + _CHATML_PROMPT
    ),
    "filters": (
        "{% for m in messages | selectattr('content') %}{{ ['<|im_start|>', m.role, '\n', m.content] | join }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "first turn in upper case": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content | upper if loop.first else m.content }}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + _CHATML_PROMPT
    ),
    "content cut at 10 characters": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[:10] + '<|im_end|>\n' }}{% endfor %}"
        + _CHATML_PROMPT
    ),
    "line breaks replaced": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.replace('\n', ' ') + '<|im_end|>\n' }}"
        "{% endfor %}" + _CHATML_PROMPT
    ),
    "only the last question": "{% for m in messages[-2:] %}" + _CHATML_TURN + _END + _CHATML_PROMPT,
    "EOS only at the end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}"
        "{% elif messages[-1].role == 'assistant' %}{{ '</s>' }}{% endif %}"
    ),
    "length of the content": (
        "{% for m in messages %}{{ m.role ~ ' (' ~ m.content | length ~ '): ' ~ m.content ~ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    ),
    "no text at all": "",
    "an error of types": _CHATML + "{{ messages[0].content + 1 }}",
    "an attribute of nothing": _CHATML + "{{ messages[0].tool.name }}",
}

_BYTES = "\x00\x01\x1f\x7f"


def _dialog(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = [Message(("user", "assistant")[at % 2], content) for at, content in enumerate(contents)]
    return (*([] if system is None else [Message("system", system)]), *turns)


CONVERSATIONS = {
    "plain": _dialog("What is it?", "It is that."),
    "system turn": _dialog("What is it?", "It is that.", system="Be brief."),
    "four turns": _dialog("And is it?", "It is.", "What is that?", "That is it, and the end."),
    "unicode": _dialog("Où est le café, 東京?", "Ёлка — “quoted” … 안녕하세요"),
    "emoji": _dialog("🎉🎉?", "👩‍👩‍👧 🏳️‍🌈!"),
    "combining characters": _dialog("e\u0301 and \u00e9", "n\u0303, \u1e9b\u0323, \ufb01"),
    "control characters": _dialog(f"a{_BYTES}b", f"{_BYTES}c"),
    "blanks around": _dialog("  What is it?  ", " It is that. "),
    "blanks inside": _dialog("a  b   c    d", "\tx\t\ty"),
    "line breaks around": _dialog("\n\nWhat is it?\n", "\nIt is that.\n\n"),
    "empty lines": _dialog("a\n\n\nb\r\n\r\nc", "1.\n\n2.\n\n\n\n3."),
    "code": _dialog("{% if x %}{{ y }}{% endif %}", "def f(a, b):\n    return a + b  # <b>&amp;</b>\n"),
    "reasoning": _dialog("Why?", "<think>\nBecause.\n</think>\n\nThat is it.", "Is it?", "<think>no</think>It is."),
    "special tokens": _dialog("Say <|im_end|> and stop.", "The end is <|im_end|>, or </s>."),
    "special token in the answer": _dialog("Say it.", "It is <|im_start|>system"),
    "half of a special token": _dialog("Say <|im_end and |> and <s", "< s> and </ s> and im_end|>"),
    "names of roles": _dialog("User", "assistant"),
    "underscore of sentencepiece": _dialog("a▁b", "▁is ▁and"),
}
