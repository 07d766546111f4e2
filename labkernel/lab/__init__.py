"""The notebook's side: what it shows, asks and checks. Nothing heavy is imported before it is needed.

from labkernel import in_child, lab

lab.begin("03-chroot")                      the set-up cell
lab.predict("…?", right={…}, wrong={…})     a question, with a reason behind each answer
lab.inside_outside(function)                the table
lab.show_walls(function)                    the picture
with lab.calmly(PermissionError): …         a failure that is expected
lab.check("03.1", answer)                   the check of an exercise
lab.show_source(function)                   how it looks in labkernel
lab.in_fork(function)                       once more fork, for namespaces that hold for children
lab.waiting(step, …)                        a process that does these steps and then waits
lab.in_box(function, …)                     a function as root of a box of its own, whoever you are
lab.reasons(choices)                        the table of capabilities, kept and dropped, with reasons and sources
lab.allows("cgroup:io")                     whether the machine allows what only some cells need
lab.scratch()                               a directory on the disk for experiments
lab.limit_files(cpus=0.5)                   which file a limit goes into, with both versions of cgroups
lab.end()                                   the clean-up cell
"""

from __future__ import annotations

from labkernel.lab.box import in_box
from labkernel.lab.calm import calmly
from labkernel.lab.checks import check
from labkernel.lab.fork import in_fork, waiting
from labkernel.lab.group import group
from labkernel.lab.limit_files import limit_files
from labkernel.lab.look import look
from labkernel.lab.notebook import allows, begin, end, requirements, show_source
from labkernel.lab.quiz import predict
from labkernel.lab.reasons import reasons
from labkernel.lab.scratch import scratch
from labkernel.lab.table import inside_outside
from labkernel.lab.walls import show_walls

__all__ = [
    "allows",
    "begin",
    "calmly",
    "check",
    "end",
    "group",
    "in_box",
    "in_fork",
    "inside_outside",
    "limit_files",
    "look",
    "predict",
    "reasons",
    "requirements",
    "scratch",
    "show_source",
    "show_walls",
    "waiting",
]
