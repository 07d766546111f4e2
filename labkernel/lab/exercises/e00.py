"""The checks of notebook 00: the doctor's table as data, and a child that goes its own way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from labkernel.lab import doctor
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.doctor import Finding
from labkernel.lab.notebook import requirements
from labkernel.lab.watch import watched


@exercise("00.1", looks_at="what your function says of this machine, and of two machines with other findings")
def will_run(answer: Callable[[list[Finding], dict[str, list[str]]], Any]) -> str:
    """The names of the notebooks whose requirements are all met, for any findings."""
    here, needs = list(doctor.examine()), requirements()
    needs = {**needs, "98-needs-nothing": [], "99-needs-much": [finding.name for finding in here]}
    nothing = [Finding(finding.name, False, "not on this machine") for finding in here]
    everything = [Finding(finding.name, True, "works") for finding in here]
    for words, findings in (
        ("a machine that allows nothing", nothing),
        ("a machine that allows everything", everything),
        ("this machine", here),
    ):
        allowed = {finding.name for finding in findings if finding.ok}
        right = {name for name, wanted in needs.items() if allowed.issuperset(wanted)}
        given = run_answer(answer, findings, needs)
        if not isinstance(given, list | tuple | set):
            raise NotYet(f"a list of names is asked for, and what came is {type(given).__name__}")
        if too_many := sorted(set(given) - right):
            raise NotYet(
                f"on {words} it says that {too_many[0]} runs, and that notebook lacks something there"
            )
        if too_few := sorted(right - set(given)):
            raise NotYet(f"on {words} it leaves out {too_few[0]}, which has there all that it needs")
    return "your function reads any machine's findings, not only this one's."


@exercise("00.2", looks_at="the working directory of your child and of this notebook, in /proc/PID/cwd")
def wander(answer: Callable[[], Any]) -> str:
    """A child that changes its working directory while the notebook stays where it is."""
    before = os.readlink("/proc/self/cwd")
    child_at = run_answer(_cwd_after, answer)
    if os.readlink("/proc/self/cwd") != before:
        os.chdir(before)
        raise NotYet("the notebook itself has moved (it has been put back)")
    if child_at == before:
        raise NotYet("after your function the child is where the notebook is")
    if child_at != "/":
        raise NotYet("the child has moved, but not to the root directory")
    return "the child's working directory is /, and the notebook has not moved."


def _cwd_after(answer: Callable[[], Any]) -> str:
    """Run the answer in a process of its own, and ask the kernel where that process stands."""
    with watched(answer) as go_on:
        return os.readlink(f"/proc/{go_on()}/cwd")
