"""A hostile template is refused in bounded time and memory; an honest one renders as in transformers."""

import pytest

from graftlm.errors import UserError
from graftlm.text.sandbox import MAX_TEMPLATE_CHARACTERS, TemplateRefused, compile_template

MESSAGES = [{"role": "user", "content": "x"}]


def grow(start: str, expression: str) -> str:
    """A template that makes ns.x from itself sixty times over."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {expression} %}}{{% endfor %}}"
    )


def render(source: str) -> str:
    return compile_template(source)(messages=MESSAGES, eos_token="</s>")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 1000000000 }}", "over 5,000,000"),
        ("{{ [1] * 1000000000 }}", "over 5,000,000"),
        (grow("'a'", "ns.x ~ ns.x"), "over 5,000,000"),
        (grow("'a'", "ns.x + ns.x"), "over 5,000,000"),
        (grow("[0]", "[ns.x, ns.x]") + "{{ ns.x }}", "200,000 items"),
        (grow("0", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
         "200,000 items"),
        (grow("0", "dict(a=ns.x, b=ns.x)") + "{{ ns.x == ns.x }}",
         "200,000 items"),
        (grow("0", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}",
         "200,000 items"),
        (grow("3", "ns.x * ns.x"), "huge number"),
        ("{{ 9 ** 9 ** 9 }}", "large power"),
        ("{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}", "over 5,000,000"),
        ("{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}", "over 5,000,000"),
        ("{% set x = 'a' * 100000 %}{{ x.join(range(10000) | map('string') | list) }}", "over 5,000,000"),
        ("{% set x = 'a' * 100000 %}{{ range(10000) | join(x) }}", "over 5,000,000"),
        ("{{ 'a' | center(1000000000) }}", "padding"),
        ("{{ 'a'.ljust(1000000000) }}", "padding"),
        ("{{ [1] | tojson(indent=1000000000) }}", "padding"),
        ("{{ [1] | batch(1000000000, 'x') | list }}", "padding"),
        ("{{ '%1000000000d' % 1 }}", "formats with %"),
        ("{{ '%1000000000d' | format(1) }}", "calls format"),
        ("{{ '{:>1000000000}'.format(1) }}", "calls format"),
        ("{{ 'a'.translate({97: 'b'}) }}", "calls translate"),
        ("{{ 'a'.encode('zip') }}", "calls encode"),
        ("{{ lipsum(n=1000000) }}", "undefined"),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "200,000 loop turns"),
        ("{% macro m() %}{% for i in range(9999) %}{{ 'a' * 100000 }}{% endfor %}{% endmacro %}{{ m() | length }}",
         "100,000,000 characters in all"),
        ("{% for i in range(9999) %}{% set x = 'a' * 4000000 %}{% endfor %}", "100,000,000 characters in all"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ raise_exception('not like this') }}", "^not like this$"),
        ("{{ raise_exception('not like this.') }}", "^not like this$"),
        ("{{ messages[0].missing.field }}", "no attribute"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_hostile_template_is_refused(source: str, reason: str) -> None:
    """C7: bombs of every kind a template can build, and ways out of the sandbox."""
    with pytest.raises(TemplateRefused, match=reason):
        render(source)


def test_a_slow_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: time is bounded, whatever the template does with it."""
    monkeypatch.setattr("graftlm.text.template_budget.MAX_SECONDS", 0.05)
    slow = "{% for i in range(100000) %}{% set y = ('a b' * 2000).split(' ') | sort | join(' ') %}{% endfor %}"
    with pytest.raises(TemplateRefused, match="ran for more than"):
        render(slow)


@pytest.mark.parametrize(
    "source",
    ["{% if 1 %}", "{{ 1 +", "{% if 1 %}" * 3000, "{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}", "{{ 1 | nothing }}",
     "a" * (MAX_TEMPLATE_CHARACTERS + 1)],
)  # fmt: skip
def test_a_template_that_cannot_be_read_is_told(source: str) -> None:
    """C7: broken, too deep or too long."""
    with pytest.raises(UserError) as told:
        render(source)
    assert "card or alpaca" in told.value.fix


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n{{ m.role }}\n{% endfor %}", "user\n"),
        ("{{ {'a': '你', 'b': [1]} | tojson }}", '{"a": "你", "b": [1]}'),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "1"),
        ("{% generation %}{% set y = 1 %}{{ y }}{% endgeneration %}{{ y }}", "1"),
        ("{{ (messages + [{'role': 'a'}])[1:] | length }}", "1"),
        ("{{ ['a', 'b'] | join('-') ~ ('x y'.split(' ') | last) ~ 'abc'[::-1] }}", "a-bycba"),
        ("{{ messages | map(attribute='content') | list | tojson(indent=2) }}", '[\n  "x"\n]'),
        ("{{ none }}{{ undefined_name }}{{ [1, 'a'] }}", "None[1, 'a']"),
    ],
)  # fmt: skip
def test_an_honest_template_renders(source: str, expected: str) -> None:
    assert render(source) == expected
