"""Weighing what a template builds."""

import threading

import pytest
from jinja2.exceptions import SecurityError

from graftlm.text import template_budget
from graftlm.text.template_budget import MAX_BUILT, MAX_SIZE, Budget


def started() -> Budget:
    budget = Budget()
    budget.start()
    return budget


def test_small_things_are_free_and_large_ones_add_up() -> None:
    budget = started()
    for _ in range(10_000):
        budget.spend(999)
    for _ in range(MAX_BUILT // MAX_SIZE):
        budget.spend(MAX_SIZE)
    with pytest.raises(SecurityError, match="in all"):
        budget.spend(1000)
    budget.start()
    budget.spend(MAX_SIZE)


def test_a_value_that_holds_itself_again_and_again_is_weighed_as_printed() -> None:
    budget = started()
    value: list[object] = []
    for _ in range(16):
        value = [value, value]
    budget.built(value)
    with pytest.raises(SecurityError, match="200,000 items"):
        budget.literal([value, value, value])


def test_every_thread_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_TICKS", 10)
    budget = started()
    for _ in range(10):
        budget.tick()
    done = []

    def other() -> None:
        budget.start()
        budget.tick()
        done.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert done
    with pytest.raises(SecurityError, match="loop turns"):
        budget.tick()
