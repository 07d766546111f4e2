"""A shared library without the names that nobody asks for, and without what nobody unwinds.

A library lists every function that others may call, for the dynamic loader to find it by its name. In Debian's
libnode these are 57 000, for modules written in C++: 7 MB of names, where the program `node` asks for some dozens.
strip(1) leaves them alone, since it cannot know who will ask; in an image, in which every file is known, we can.

The tables of names stand first in the file, before the relocations. They are written anew, with what the library
itself imports and what is asked for; the segments behind them move up in the file, but not in memory, so that no
other address changes. A relocation by a name that is gone becomes one by its address, as the linker's -Bsymbolic
would have made it. And where a library neither throws nor catches
C++ exceptions (libnode does not), the tables for it go, too, 2.6 MB there: a debugger would miss them.
Source: elf(5); the System V ABI, "Dynamic Linking"; glibc's elf/dl-reloc.c and dl-lookup.c.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct(
    "<IIQQQQQQ"
)  # type, flags, offset, address, address, size in file, in memory, alignment
DYNAMIC = struct.Struct("<qQ")
SYMBOL = struct.Struct("<IBBHQQ")  # name, type, visibility, section, value, size
RELOCATION = struct.Struct("<QQq")  # address, symbol and type, addend

PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_GNU_EH_FRAME, PT_GNU_PROPERTY = 1, 2, 4, 0x6474E550, 0x6474E553
DT_NEEDED, DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ, DT_STRSZ = 1, 2, 5, 6, 7, 8, 10
DT_SONAME, DT_RPATH, DT_PLTREL, DT_JMPREL, DT_RUNPATH = 14, 15, 20, 23, 29
DT_GNU_HASH, DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM, DT_VERDEF, DT_VERDEFNUM = (
    0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF, 0x6FFFFFFC,
    0x6FFFFFFD,
)  # fmt: skip

# Of each machine: a 64-bit address, an address in the table of globals, one in that of functions; the one without name.
TYPES = {62: (1, 6, 7, 8), 183: (257, 1025, 1026, 1027)}

PAGE = 0x1000

UNWINDING = ("_Unwind_", "__cxa_throw", "__cxa_rethrow", "__cxa_begin_catch", "__gxx_personality")
"""Functions of which a library calls one that throws or catches exceptions."""


class NotThisOne(ValueError):
    """A library that is not built as we expect it: it stays as it is."""


def without_names(data: bytes, asked_for: Collection[str]) -> bytes:
    """The library *data* with no other names of its own than those *asked_for*. Raises NotThisOne."""
    return _Library(data).without(asked_for)


def names(files: Collection[Path]) -> set[str]:
    """The names in the tables of ELF *files*: those that they ask for, and their own, which may go before others'."""
    return {name for file in files for name, _ in _Library(file.read_bytes()).symbols()}


class _Library:
    def __init__(self, data: bytes) -> None:
        self.data = data
        if data[:6] != b"\x7fELF\2\1":
            raise NotThisOne("not for a 64-bit machine that writes the low byte first")
        self.header = HEADER.unpack_from(data)
        start, size, count = self.header[5], self.header[9], self.header[10]
        self.segments: list[tuple[int, ...]] = [
            SEGMENT.unpack_from(data, start + size * number) for number in range(count)
        ]
        dynamic = next(segment for segment in self.segments if segment[0] == PT_DYNAMIC)
        self.dynamic_at = dynamic[2]
        entries = [DYNAMIC.unpack_from(data, dynamic[2] + at) for at in range(0, dynamic[5], DYNAMIC.size)]
        self.dynamic = entries[: entries.index((0, 0)) + 1]
        self.values = dict(self.dynamic)

    def offset(self, address: int) -> int:
        """Where in the file that is which is at *address* in memory."""
        for kind, _, offset, start, _, size, *_ in self.segments:
            if kind == PT_LOAD and start <= address < start + size:
                return offset + address - start
        raise NotThisOne(f"nothing is at the address {address:#x}")

    def text(self, at: int) -> str:
        start = self.offset(self.values[DT_STRTAB]) + at
        return self.data[start : self.data.index(b"\0", start)].decode()

    def symbols(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names, and the entries to which they belong. The table of texts begins where that of names ends."""
        start, end = self.values[DT_SYMTAB], self.values[DT_STRTAB]
        if not start < end:
            raise NotThisOne("the texts stand before the names")
        for entry in SYMBOL.iter_unpack(
            self.data[self.offset(start) : self.offset(start) + (end - start) // 24 * 24]
        ):
            yield self.text(entry[0]), entry

    def without(self, asked_for: Collection[str]) -> bytes:
        if self.header[2] not in TYPES:
            raise NotThisOne("another machine")
        if not {DT_GNU_HASH, DT_RELA, DT_JMPREL, DT_VERSYM} <= set(self.values):
            raise NotThisOne("it calls nobody, or has an older table of names")
        *named, nameless = TYPES[self.header[2]]
        data = bytearray(self.data)
        symbols = [entry for _, entry in self.symbols()]
        # Thread-local variables (6) and functions that choose themselves (10) have no address to put in place.
        imports = [number for number, one in enumerate(symbols) if one[3] == 0]
        exports = [
            number
            for number, one in enumerate(symbols)
            if one[3] != 0 and (one[1] & 15 in (6, 10) or self.text(one[0]) in asked_for)
        ]
        new = {old: number for number, old in enumerate(imports + exports)}

        # The relocations of functions follow the others: they become one table, in which all is done at the start.
        start, size = self.values[DT_RELA], self.values[DT_RELASZ]
        if self.values.get(DT_JMPREL) != start + size:
            raise NotThisOne("two tables of relocations that are not one after the other")
        size += self.values[DT_PLTRELSZ]
        for at in range(self.offset(start), self.offset(start) + size, RELOCATION.size):
            address, info, addend = RELOCATION.unpack_from(data, at)
            symbol, kind = info >> 32, info & 0xFFFFFFFF
            if symbol in new:
                info = new[symbol] << 32 | kind
            elif kind in named:
                addend = symbols[symbol][4] + (addend if kind == named[0] else 0)
                info = nameless
            else:
                raise NotThisOne(f"a relocation of kind {kind} for {self.text(symbols[symbol][0])}")
            RELOCATION.pack_into(data, at, address, info, addend)

        texts = _Texts()
        table = b"".join(SYMBOL.pack(texts.add(self.text(symbols[n][0])), *symbols[n][1:]) for n in new)
        versions = self.offset(self.values[DT_VERSYM])
        version = b"".join(data[versions + 2 * n : versions + 2 * n + 2] for n in new)
        needed = self.versions_needed(texts)
        hashed = _hash_table([self.text(symbols[n][0]) for n in exports], len(imports))
        changed = {DT_RELASZ: size}
        defined = {DT_VERDEF: self.versions_defined(texts)} if DT_VERDEF in self.values else {}
        for tag in (DT_SONAME, DT_RPATH, DT_RUNPATH):
            if tag in self.values:
                changed[tag] = texts.add(self.text(self.values[tag]))
        libraries = [texts.add(self.text(value)) for tag, value in self.dynamic if tag == DT_NEEDED]
        parts = {
            DT_GNU_HASH: hashed,
            DT_SYMTAB: table,
            DT_STRTAB: bytes(texts.data),
            DT_VERSYM: version,
            DT_VERNEED: needed,
            **defined,
        }
        changed[DT_STRSZ] = len(texts.data)

        # Where they stand in memory: as near before the relocations as whole pages allow.
        parts = {tag: part + bytes(-len(part) % 8) for tag, part in parts.items()}
        begin = (start - sum(map(len, parts.values()))) // PAGE * PAGE
        if begin <= PAGE:
            raise NotThisOne("nothing to be gained")
        blob = b""
        for tag, part in parts.items():
            changed[tag] = begin + len(blob)
            blob += part
        blob += bytes(start - begin - len(blob))

        dynamic = b""
        for tag, value in self.dynamic:
            if tag == DT_NEEDED:
                value = libraries.pop(0)
            if tag not in (DT_JMPREL, DT_PLTRELSZ, DT_PLTREL):
                dynamic += DYNAMIC.pack(tag, changed.get(tag, value))
        data[self.dynamic_at : self.dynamic_at + len(dynamic)] = dynamic

        # The first segment becomes two, with nothing between them: its header, and what begins at `begin`.
        first, *others = (segment for segment in self.segments if segment[0] == PT_LOAD)
        if first[2] or first[3] or not first[5] > start:
            raise NotThisOne("the relocations are not in the first segment")
        loaded = [
            ((*first[:3], 0, 0, PAGE, PAGE, PAGE), bytes(PAGE)),
            (
                (*first[:3], begin, begin, first[5] - begin, first[5] - begin, PAGE),
                blob + data[start : first[5]],
            ),
            *((segment, bytes(data[segment[2] : segment[2] + segment[5]])) for segment in others),
        ]
        unwound = next((segment for segment in self.segments if segment[0] == PT_GNU_EH_FRAME), None)
        if unwound and not any(self.text(symbols[n][0]).startswith(UNWINDING) for n in imports):
            loaded = [
                (_shorter(*one, unwound[3]) if self.frames_end(one[0], unwound) else one) for one in loaded
            ]
        else:
            unwound = None
        gone = {PT_LOAD, PT_NOTE, PT_GNU_PROPERTY} | ({PT_GNU_EH_FRAME} if unwound else set())
        return self.laid_out(loaded, gone)

    def laid_out(self, loaded: list[tuple[tuple[int, ...], bytes]], without: set[int]) -> bytes:
        """The file: what is loaded, one after the other, and the header that says so."""
        file = bytearray()
        segments = []
        for segment, content in loaded:
            file += bytes((segment[3] - len(file)) % PAGE)
            segments.append((*segment[:2], len(file), *segment[3:]))
            file += content
        for kind, flags, _, *rest in (one for one in self.segments if one[0] not in without):
            places = [
                at + rest[0] - start
                for _, _, at, start, _, size, *_ in segments
                if start <= rest[0] < start + size
            ]
            segments.append((kind, flags, places[0] if rest[0] and places else 0, *rest))
        head = list(self.header)
        head[6] = head[11] = head[12] = head[13] = 0  # no table of sections: linkers and debuggers read it
        head[5], head[10] = HEADER.size, len(segments)
        front = HEADER.pack(*head) + b"".join(SEGMENT.pack(*segment) for segment in segments)
        if len(front) > PAGE:
            raise NotThisOne("too many segments")
        file[: len(front)] = front
        return bytes(file)

    def frames_end(self, segment: tuple[int, ...], unwound: tuple[int, ...]) -> bool:
        """Whether the tables for unwinding are the last in this segment: their index, and then they themselves."""
        if not segment[3] <= unwound[3] < segment[3] + segment[5]:
            return False
        offset = self.header[6]
        sections = [struct.unpack_from("<IIQQQQ", self.data, offset + 64 * n) for n in range(self.header[12])]
        inside = [one for one in sections if unwound[3] <= one[3] < segment[3] + segment[5]]
        if len(inside) != 2:
            raise NotThisOne("something stands behind the tables for unwinding")
        return True

    def versions_defined(self, texts: _Texts) -> bytes:
        """The table of the versions that names of its own have, with the places of its texts in *texts*."""
        start = self.offset(self.values[DT_VERDEF])
        table = bytearray()
        at = 0
        for _ in range(self.values[DT_VERDEFNUM]):
            _, _, _, count, _, name, following = struct.unpack_from("<HHHHIII", self.data, start + at)
            table.extend(bytes(max(0, at + name + 8 * count - len(table))))
            table[at : at + 20] = self.data[start + at : start + at + 20]
            place = at + name
            for _ in range(count):
                text, further = struct.unpack_from("<II", self.data, start + place)
                struct.pack_into("<II", table, place, texts.add(self.text(text)), further)
                place += further
            at += following
        return bytes(table)

    def versions_needed(self, texts: _Texts) -> bytes:
        """The table of the versions that the imports are to have, with the places of its texts in *texts*."""
        if DT_VERNEED not in self.values:
            raise NotThisOne("no versions")
        start = self.offset(self.values[DT_VERNEED])
        table = bytearray()
        at = 0
        for _ in range(self.values[DT_VERNEEDNUM]):
            _, count, name, entry, following = struct.unpack_from("<HHIII", self.data, start + at)
            ends = at + entry + 16 * count
            table.extend(bytes(max(0, ends - len(table))))
            table[at:ends] = self.data[start + at : start + ends]
            struct.pack_into("<I", table, at + 4, texts.add(self.text(name)))
            for number in range(count):
                place = at + entry + 16 * number
                (version,) = struct.unpack_from("<I", self.data, start + place + 8)
                struct.pack_into("<I", table, place + 8, texts.add(self.text(version)))
            at += following
        return bytes(table)


def _shorter(segment: tuple[int, ...], content: bytes, end: int) -> tuple[tuple[int, ...], bytes]:
    """A segment that ends in memory at *end*."""
    size = end - segment[3]
    return (*segment[:5], size, size, *segment[7:]), content[:size]


class _Texts:
    def __init__(self) -> None:
        self.data = bytearray(b"\0")
        self.places = {"": 0}

    def add(self, text: str) -> int:
        if text not in self.places:
            self.places[text] = len(self.data)
            self.data += text.encode() + b"\0"
        return self.places[text]


def _hash_table(names: list[str], before: int) -> bytes:
    """The table by which the loader finds a name: one bucket for all, a Bloom filter that lets everything through."""
    chain = [_hash(name) & ~1 for name in names]
    if chain:
        chain[-1] |= 1  # the last of its bucket
    head = struct.pack("<IIIIQI", 1, before, 1, 0, 0xFFFFFFFFFFFFFFFF, before if names else 0)
    return head + struct.pack(f"<{len(chain)}I", *chain)


def _hash(name: str) -> int:
    value = 5381
    for byte in name.encode():
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value
