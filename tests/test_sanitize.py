"""tests/sanitize.cfg: each rule on what it must change, and on what it must leave alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nbval.plugin import get_sanitize_patterns

RULES: list[tuple[str, str]] = get_sanitize_patterns(Path(__file__).with_name("sanitize.cfg").read_text())

# Two texts that count as the same, then two that do not; one row for each rule, in the order of the file.
EXAMPLES = [
    (
        ("<Figure size 640x480 with 1 Axes>", "<Figure size 636x476 with 2 Axes>"),
        ("Figure size 640x480", "Figure size 636x476"),
    ),
    (
        ("<object at 0x7f034f14f300>", "<object at 0x7f4c376c73a0>"),
        ("the stack is at 0x7f034f14f300>", "the stack is at 0x7f4c376c73a0>"),
    ),
]


def sanitized(text: str) -> str:
    """Apply all rules, as nbval does."""
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text


def test_every_rule_has_examples() -> None:
    assert len(RULES) == len(EXAMPLES)
    text = Path(__file__).with_name("sanitize.cfg").read_text()
    assert len(re.findall("^regex:", text, re.MULTILINE)) == len(RULES), (
        "a rule is not written as nbval reads it"
    )


@pytest.mark.parametrize(("rule", "examples"), list(zip(RULES, EXAMPLES, strict=True)))
def test_rule(rule: tuple[str, str], examples: tuple[tuple[str, str], tuple[str, str]]) -> None:
    same, different = examples
    assert re.sub(*rule, same[0]) != same[0], "this rule is not the one that changes the example"
    assert sanitized(same[0]) == sanitized(same[1])
    assert sanitized(different[0]) == different[0]
    assert sanitized(different[1]) == different[1]
