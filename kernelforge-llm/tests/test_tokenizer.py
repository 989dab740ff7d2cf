from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import AssetError, UsageError
from kernelforge_llm import tokenizer as tokenizer_module
from kernelforge_llm.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
TINYPY = Path(tokenizer_module.__file__).parent / "assets" / "tinypy"

CHAT = """{{ bos_token }}{% for message in messages %}
<|{{ message['role'] }}|>{% generation %}{{ message['content'] | trim }}{% endgeneration %}

{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
HELLO = [{"role": "user", "content": " hello "}]


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tinypy() -> Tokenizer:
    return load(TINYPY)


def changed(folder: Path, *, config: dict[str, Any] | None = None, **tokenizer: Any) -> Path:
    """A copy of tinypy's tokenizer with other content."""
    content = {**json.loads((TINYPY / "tokenizer.json").read_text(encoding="utf-8")), **tokenizer}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copyfile(TINYPY / "tokenizer_config.json", folder / "tokenizer_config.json")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_ids_equal_the_reference(tinypy: Tokenizer) -> None:
    prompts = json.loads((DATA / "tinypy" / "golden_prompts.json").read_text(encoding="utf-8"))
    golden = np.load(DATA / "tinypy" / "golden.npz")
    assert len(prompts) == 3
    for number, prompt in enumerate(prompts):
        ids = tinypy.encode(prompt)
        assert ids == golden[f"p{number}_ids"].tolist()
        assert tinypy.decode(ids) == prompt
        assert tinypy.encode(prompt, add_special=False) == ids[1:]


def test_special_ids(tinypy: Tokenizer) -> None:
    assert (tinypy.vocab_size, tinypy.special_ids) == (4096, frozenset([0]))
    ids = tinypy.encode("x")
    assert tinypy.decode(ids) == "x"
    assert tinypy.decode(ids, skip_special=False) == "<|endoftext|>x"
    assert [tinypy.has_text(token) for token in (0, 5, 4095, 4096)] == [False, True, True, False]


@pytest.mark.parametrize("text", ["", "naïve 你好 🎉\n\tx = 1\r\n", "\x00\ufffd", " " * 50])
def test_any_text_comes_back(tinypy: Tokenizer, text: str) -> None:
    assert tinypy.decode(tinypy.encode(text)) == text


def test_what_cannot_be_encoded_or_decoded(tinypy: Tokenizer) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        tinypy.encode("a\ud800b")
    for ids in ([-1], [5, 1 << 32]):
        with pytest.raises(UsageError, match="token ids must be from 0 to 4095"):
            tinypy.decode(ids)
    assert tinypy.decode([100_000]) == ""


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    tokenizer = load(changed(tmp_path, truncation=truncation, padding=padding))
    text = "def quicksort(items):\n"
    assert tokenizer.encode(text) == load(TINYPY).encode(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json is not JSON"),
        ("[]", "tokenizer.json holds a JSON list"),
        ("{}", "tokenizer.json is not a tokenizer"),
        ('{"version": "1.0", "model": {"type": "Magic"}}', "tokenizer.json is not a tokenizer"),
    ],
)
def test_refuses_what_is_no_tokenizer(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(AssetError, match=message):
        Tokenizer.load(tmp_path)


def test_refuses_what_the_native_library_panics_on(tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": [*single, *single], "special_tokens": {}}
    with pytest.raises(AssetError, match="is not a tokenizer"):
        Tokenizer.load(changed(tmp_path, post_processor=post))


@pytest.mark.parametrize("merges", [[["a", "b"]], ["a b"], [[]]])
def test_refuses_what_the_native_library_aborts_on(tmp_path: Path, merges: list[Any]) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges, "continuing_subword_prefix": "##"}
    with pytest.raises(AssetError, match="lacks the prefix '##'"):
        Tokenizer.load(changed(tmp_path, model=model))


def test_an_id_far_beyond_a_vocabulary_is_not_written(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1 << 25}, "unk_token": "a"}
    tokenizer = Tokenizer.from_content({"version": "1.0", "added_tokens": [], "model": model}, {}, None, "here")
    with pytest.raises(AssetError, match=f"token id {1 << 25}; ids must be below {1 << 24}"):
        tokenizer.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_broken_tokenizer_config(tmp_path: Path) -> None:
    changed(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(AssetError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}])
def test_chat_template(tmp_path: Path, bos: Any) -> None:
    tokenizer = load(changed(tmp_path, config={"chat_template": CHAT, "bos_token": bos, "eos_token": None}))
    assert tokenizer.apply_chat_template(HELLO) == "<s><|user|>hello\n<|assistant|>"
    assert tokenizer.apply_chat_template(HELLO, add_generation_prompt=False) == "<s><|user|>hello\n"


def test_chat_template_in_a_file_or_a_list(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert load(changed(tmp_path, config={"chat_template": templates})).apply_chat_template(HELLO) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages | tojson }}", encoding="utf-8")
    assert load(tmp_path).apply_chat_template([{"role": "user", "content": "<é>"}]) == (
        'file [{"role": "user", "content": "<é>"}]'
    )


def test_what_templates_are_given(tmp_path: Path) -> None:
    loop = "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    template = "{{ strftime_now('%Y') | length }}" + loop
    assert load(changed(tmp_path, config={"chat_template": template})).apply_chat_template(HELLO) == "4012"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("line\n{% if %}", "is broken at line 2"),
        ("a\nb\n{{ nothing.at.all }}", "fails at line 3: 'nothing' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "fails at line 1"),
        ("a\n{{ 1 / 0 }}", "fails at line 2: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "fails at line 1: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "fails at line 1"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails at line 1: Range too big"),
        (
            "{% for n in [messages] %}{% for i in range(9) recursive %}{{ loop(n) }}{% endfor %}{% endfor %}",
            "recursion",
        ),
        ("{{ lipsum(n=9) }}", "'lipsum' is undefined"),
        ("{{ '%99999d' % 1 }}", "fails at line 1: it formats to a width of more than 9999"),
        ("{{ '{:99999}'.format(1) }}", "it formats to a width of more than 9999"),
        ("{{ '%*d' % (10 ** 9, 1) }}", "it formats to a width .* not written there"),
        ("{{ '{:{}}'.format(1, 10 ** 9) }}", "it formats to a width .* not written there"),
        ("{{ '%*d' | format(10 ** 9, 1) }}", "it formats to a width .* not written there"),
        ("{{ messages | tojson(indent=10 ** 9) }}", "an indent of more than 64"),
        ("{{ strftime_now('%A' * 10000) }}", "a date's pattern of more than 1000 characters"),
        ("{{ 10 ** (10 ** 10) }}", "it computes with integers of more than 4096 bits"),
        ("{{ 2 ** 4000 * 2 ** 4000 }}", "it computes with integers of more than 4096 bits"),
        ("{{ ('f' * 2000) | int(0, 16) }}", "it computes with integers of more than 4096 bits"),
        ("{{ 0x" + "f" * 2000 + " // 3 > 1 }}", "it computes with integers of more than 4096 bits"),
        ("{{ 5 | round(-2000) }}", "it computes with integers of more than 4096 bits"),
        ("{{ 5 | round(method='ceil', precision=2000) }}", "it computes with integers of more than 4096 bits"),
        ("{{ [[1], [2]] | sum(start=[]) }}", "it adds up what are no numbers"),
        ("{{ 'a'.encode() }}", "access to attribute 'encode'"),
        ("{{ (1).to_bytes(9, 'big') }}", "access to attribute 'to_bytes'"),
        ("{{ 'a'.translate({97: 'b'}) }}", "access to attribute 'translate'"),
        ("{{ 'a b' | wordwrap(1) }}", "No filter named 'wordwrap'"),
        ("{{ 'abc' | truncate(1) }}", "expected length >= 3"),
    ],
)
def test_a_broken_or_hostile_template(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = load(changed(tmp_path, config={"chat_template": template}))
    with pytest.raises(AssetError, match=message):
        tokenizer.apply_chat_template(HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'ab' | indent(10 ** 9, true) }}",
        "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x={}) %}{% for i in range(50) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
        "{% set x = 'a' * 10 ** 6 %}{{ " + " ~ ".join("x" * 100) + " }}",
        "{{ ('{0}' * 1000).format('a' * 10 ** 5) }}",
        "{{ ('{a}' * 1000).format_map({'a': 'a' * 10 ** 5}) }}",
        "{{ ('%(a)s' * 1000) % {'a': 'a' * 10 ** 5} }}",
        "{{ ('%(a)s' * 1000) | format(a='a' * 10 ** 5) }}",
        "{{ ('%(a)9999d' * 10 ** 4) % {'a': 1} }}",
        "{{ range(10 ** 5) | join('a' * 1000) }}",
        "{{ range(10 ** 5) | map('string') | join('a' * 1000) }}",
        "{{ ('a' * 1000).join(range(10 ** 5) | map('string')) }}",
        "{{ ['a' * 10 ** 5] | replace('a', 'b' * 1000) }}",
        "{{ ('a' * 10 ** 5) | replace(new='b' * 1000, old='a') }}",
        "{{ ('a' * 10 ** 6).strip('b' * 1000 ~ 'a') }}",
        "{{ ('a' * 10 ** 6) | trim('b' * 1000 ~ 'a') }}",
        "{{ ('a' * 10 ** 6).rfind('a' * 100 ~ 'b' ~ 'a' * 100) }}",
        "{% for i in range(10 ** 5) %}" + "text " * 2000 + "{% endfor %}",
        "{% macro m(n) %}" + "text " * 200 + "{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    ],
)
def test_a_template_that_makes_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("kernelforge_llm.template_sandbox.MOST", 3_000_000)
    tokenizer = load(changed(tmp_path, config={"chat_template": template}))
    tracemalloc.start()
    try:
        with pytest.raises(AssetError, match="fails at line 1: it makes more than 3 MB") as caught:
            tokenizer.apply_chat_template(HELLO)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000, "it was made"
    finally:
        tracemalloc.stop()
    assert caught.value.exit_code == 13


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}{% set b = m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ range(10 ** 5) | map('int') | map('list') | list if 0 }}{% for i in range(10 ** 5) %}"
        "{% set x = range(10 ** 5) | map('abs') | sum %}{% endfor %}",
    ],
)
def test_a_template_that_computes_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("kernelforge_llm.template_sandbox.SECONDS", 0.2)
    tokenizer = load(changed(tmp_path, config={"chat_template": template}))
    with pytest.raises(AssetError, match=r"chat template fails at line 1: it computes for more than 0\.2 s"):
        tokenizer.apply_chat_template(HELLO)


def test_what_a_template_computes_is_what_jinja_computes(tmp_path: Path) -> None:
    template = """{%- set ns = namespace(n=0, last=none) -%}
{%- for message in messages[::-1] -%}{%- set ns.n = ns.n + 1 -%}{%- set ns.last = message -%}{%- endfor -%}
{{- ns.n ~ ns.last.role }} {{ "%s-%d" % ("a", 1732665600) }} {{ "{}!".format(2 ** 10) }}
{{- " " ~ ([1, 2] + [3]) }} {{ (1, "x") }} {{ {"a": [1]} }}
{#- a tuple that is assigned to -#}
{%- for a, b in [(1, 2), (3, 4)] if a > 1 %} {{ a * b }} {{ loop.first }} {{ loop.last }} {{ loop.length }}{% endfor %}
{%- for a in [] %}{{ a }}{% else %} no{% endfor %}
{%- set text %}<{{ "a b".split()[-1] | upper }}>{% endset %} {{ text | trim ~ 7 % 4 }} {{ "x" * 3 }} {{ "role" in messages[0] }}
{%- macro twice(x, sep=", ") %}{{ [x, x] | join(sep) }}{% endmacro %} {{ twice("y") }}
{{- " " ~ messages | map(attribute="role") | list | length }}
{{- " %%123456 %s" % "a" }} {{ "{{{:*^5}}}".format("b") }} {{ "%05.1f" % 2 }} {{ "123456%s" | format(1) }}
{{- " " ~ [1, 2] | sum }} {{ 2.345 | round(1) }} {{ "xay".strip("yx") }}"""
    tokenizer = load(changed(tmp_path, config={"chat_template": template}))
    want = "1user a-1732665600 1024! [1, 2, 3] (1, 'x') {'a': [1]} 12 True True 1 no <B>3 xxx True y, y 1 "
    want += "%123456 a {**b**} 002.0 1234561 3 2.3 a"
    assert tokenizer.apply_chat_template(HELLO) == want


def test_a_long_conversation_is_no_burden(tmp_path: Path) -> None:
    template = CHAT.replace("message['content']", "message['content'].replace('<|im_start|>', '<|begin_of_text|>')")
    assert template != CHAT
    tokenizer = load(changed(tmp_path, config={"chat_template": template, "bos_token": "<s>", "eos_token": None}))
    long = {"role": "user", "content": "<|im_start|> words " * 40_000}
    assert len(tokenizer.apply_chat_template([long])) > 880_000
    messages = [{"role": "user", "content": "words " * 200}] * 1000
    assert len(tokenizer.apply_chat_template(messages)) > 1_200_000


def test_chat_requests_that_cannot_be_served(tmp_path: Path, tinypy: Tokenizer) -> None:
    with pytest.raises(AssetError, match="the model has no chat template") as caught:
        tinypy.apply_chat_template(HELLO)
    assert caught.value.exit_code == 13
    refusing = "{{ raise_exception('roles must alternate') }}"
    tokenizer = load(changed(tmp_path, config={"chat_template": refusing}))
    with pytest.raises(UsageError, match="refuses the messages: roles must alternate"):
        tokenizer.apply_chat_template(HELLO)
    with pytest.raises(UsageError, match="needs a role and a content"):
        tokenizer.apply_chat_template([{"content": "x"}])
    with pytest.raises(AssetError, match="chat_template is not text"):
        Tokenizer.load(changed(tmp_path, config={"chat_template": 3}))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(AssetError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.load(tmp_path)
