"""The kernel's primitives: system calls, namespaces, mounts, users, network, cgroups, capabilities, seccomp.

Nothing here prints, draws, or imports anything of the packages above it.
"""
