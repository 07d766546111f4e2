"""Answers that somebody might give to the exercises of notebook 19; each must fail."""

HEAD = "def refuse_family(family, number):\n    return b''.join([\n"
CHECK = "op(LOAD, 4), op(JUMP_IF_EQUAL, seccomp.ARCHITECTURES[MACHINE], if_false={}),\n"
NUMBER = "op(JUMP_IF_EQUAL, seccomp.call_number(MACHINE, 'socket'), if_false={}),\n"
END = "op(RETURN, ERRNO | number), op(RETURN, ALLOW), op(RETURN, seccomp.KILL_PROCESS)])"

DOORS = (
    "def hole(program, name):\n"
    "    x86_64, i386 = seccomp.call_number('x86_64', name), seccomp.call_number('i386', name)\n"
)
UNION = (
    "def exactly(days):\n    names = frozenset()\n    for command in days:\n"
    "        names |= seccomp_notify.trace(command).calls\n"
)

WRONG: dict[str, list[str]] = {
    "19.1": [
        "def refuse_family(family, number):\n    return None",
        "def refuse_family(family, number):\n    return b''",
        "def refuse_family(family, number):\n    return op(RETURN, ERRNO | number)",
        "def refuse_family(family, number):\n    return refuse_well(MACHINE, 'socket')",
        # no check of the architecture
        HEAD + "op(LOAD, 0), op(JUMP_IF_AT_LEAST, X32, if_true=5),\n" + NUMBER.format(3)
        + "op(LOAD, 16), op(JUMP_IF_EQUAL, family, if_false=1)," + END,
        # no check of bit 30
        HEAD + CHECK.format(6) + "op(LOAD, 0)," + NUMBER.format(3)
        + "op(LOAD, 16), op(JUMP_IF_EQUAL, family, if_false=1)," + END,
        # the first argument of any call
        HEAD + CHECK.format(6) + "op(LOAD, 0), op(JUMP_IF_AT_LEAST, X32, if_true=4),\n"
        + "op(LOAD, 16), op(JUMP_IF_EQUAL, family, if_false=1)," + END,
        # the upper half as well
        "def refuse_family(family, number):\n"
        "    rule = Rule(('socket',), ERRNO | number, (Comparison(0, 'EQ', family),))\n"
        "    return seccomp.compile_profile(Profile((rule,), ALLOW))",
        # another errno
        HEAD + CHECK.format(7) + "op(LOAD, 0), op(JUMP_IF_AT_LEAST, X32, if_true=5),\n" + NUMBER.format(3)
        + "op(LOAD, 16), op(JUMP_IF_EQUAL, family, if_false=1)," + END.replace("| number", "| errno.EPERM"),
        # a jump that is one too long
        HEAD + CHECK.format(8) + "op(LOAD, 0), op(JUMP_IF_AT_LEAST, X32, if_true=5),\n" + NUMBER.format(3)
        + "op(LOAD, 16), op(JUMP_IF_EQUAL, family, if_false=1)," + END,
        # always the same family
        HEAD + CHECK.format(7) + "op(LOAD, 0), op(JUMP_IF_AT_LEAST, X32, if_true=5),\n" + NUMBER.format(3)
        + "op(LOAD, 16), op(JUMP_IF_EQUAL, 2, if_false=1)," + END,
    ],
    "19.2": [
        "def hole(program, name):\n    return I386, 21",
        DOORS + "    return I386, i386",
        DOORS + "    return X86_64, X32 | x86_64",
        DOORS + "    return I386, x86_64",
        DOORS + "    return (I386, i386) if seccomp.answer(program, I386, i386) == 'allow' else None",
        DOORS + "    return (X86_64, 39) if seccomp.answer(program, X86_64, 39) == 'allow' else None",
        "def hole(program, name):\n    return 'i386'",
    ],
    "19.3": [
        "def exactly(days):\n    return None",
        "def exactly(days):\n    return op(RETURN, ALLOW)",
        "def exactly(days):\n    return op(RETURN, ERRNO | errno.EPERM)",
        "def exactly(days):\n    return allow_list(seccomp_notify.trace(days[0]).calls)",
        "def exactly(days):\n    return allow_list(seccomp_notify.trace(days[-1]).calls)",
        UNION + "    return allow_list(names | {'ptrace'})",
        UNION + "    return allow_list(names - {'execve'})",
        UNION + "    return allow_list(names, seccomp.LOG)",
        UNION + "    return allow_list(frozenset({'read', 'write', 'openat', 'execve', 'mmap', 'exit_group'}))",
    ],
}  # fmt: skip
