import ctypes
from enum import IntEnum
from labkernel.linux import syscalls
class Capability(IntEnum):
    CAP_KILL = 5
DOCKER_DEFAULT = frozenset({0,1,3,4,5,6,7,8,10,13,18,27,29,31})
def parse(names): return frozenset()
class H(ctypes.Structure): _fields_=[('v',ctypes.c_uint32),('pid',ctypes.c_int)]
def limit_to(keep):
    for c in range(41):
        if c not in keep: syscalls.prctl(24,c)
    m=sum(1<<c for c in keep)
    d=(ctypes.c_uint32*6)(m&0xffffffff,m&0xffffffff,0,m>>32,m>>32,0)
    syscalls.check(syscalls.libc.capset(ctypes.byref(H(0x20080522,0)),d),'capset')
