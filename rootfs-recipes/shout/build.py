"""What shout runs on, out of the image that has everything: node, its libraries by ELF, and shout's own files."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from elf_names import NotThisOne, names, without_names

from labkernel.image import Progress, elf
from labkernel.image.closure import Closure, closure, merged
from labkernel.image.pack import pack
from labkernel.image.recipes import BuildError, Recipe
from labkernel.image.unpack import unpack

MODULES = "/usr/local/lib/node_modules"

LEFT_OUT = {
    "*.md": "to read", "*.markdown": "to read", "*/history*": "to read", "*/changelog*": "to read",
    "*/doc/*": "to read", "*/docs/*": "to read", "*/example*/*": "to read",
    "*/test/*": "tests", "*/tests/*": "tests", "*/bench*/*": "tests", "*/coverage/*": "tests",
    "*/.*": "settings of tools", "*.yml": "settings of tools", "*/*file.js": "settings of tools",
    "*/bower.json": "settings of tools", "*/component.json": "settings of tools", "*.lock": "settings of tools",
    "*.map": "for debuggers in browsers", "*.log": "somebody forgot it",
    "*.ts": "types, for compilers", "*.flow": "types, for compilers", "*.coffee": "sources of what is there",
    "*.c": "sources in C", "*.cc": "sources in C", "*.h": "sources in C", "*.gyp": "sources in C",
    "moment/lang/*": "dates in other languages", "moment/min/*": "the same again, for browsers",
    "ajv/dist/*": "the same again, for browsers", "uri-js/dist/esnext/*": "the same again, in another dialect",
    "psl/data/*": "what psl/dist was made of", "psl/dist/*umd*": "the same again, for browsers",
    "psl/dist/*.mjs": "the same again, in another dialect",
    "engine.io-client/engine.io.js": "the same again, for browsers", "socket.io-client/dist/*slim*": "not asked for",
    "socket.io-client/dist/socket.io.js": "the min.js is served", "*.jst": "what ajv/lib/dotjs was made of",
    "lodash/lodash.js": "what lodash/dist was made of", "tweetnacl/nacl.js": "the slow one of two",
    "tweetnacl/*.min.js": "the same again, for browsers", "uri-js/*.min.js": "the same again, for browsers",
    "punycode/*.es6.js": "the same again, in another dialect", "*.patch": "how it was changed", "*/tests.js": "tests",
    "lodash/dist/*.min.js": "the same again, for browsers", "lodash/dist/lodash.[cu]*.js": "the same, for old browsers",
    "shout/client/js/libs/*": "what libs.min.js was made of",
    "*.eot": "fonts for old browsers; all are there as woff", "*.ttf": "the same", "*/fonts/*.svg": "the same",
}  # fmt: skip
"""Of the files under node_modules, in small letters, and why. Licences stay: they ask for it."""

LANGUAGES_LEFT_OUT = {
    r"(\w+/)?(?!en\.|en_US\.|res_index\.)[a-z]{2,3}(_\w*)?\.res": "every language but English, as node's small-icu",
    r"brkitr/.*": "where words and lines end",
    r"rbnf/.*": "numbers in words",
    r"(lang|region)/.*": "what languages and countries are called",
    r"translit/.*": "from one script into another",
    r".*\.cnv": "encodings from before Unicode; for these shout has iconv-lite",
    r"unames\.icu|confusables\.cfu|rfc\d+\w*\.spp": "names of characters, which look alike, which go into passwords",
}
"""Of the 31 MB that ICU, the library with which node writes dates and sorts words, knows of the world's languages."""

NODE = "node, or a library of it"

START = f'#!/usr/bin/node\nrequire("{MODULES}/shout");\n'
"""The program `shout`. Its own first line asks for /usr/bin/env, which nobody else here needs."""


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Fill *root* from the image shout-naive."""
    tell("unpack shout-naive", 0, 1)
    naive = recipe.image("shout-naive")
    content = closure([])
    add_node(content, naive)
    add_modules(content, naive)
    content.file("/usr/local/bin/shout", START.encode(), "the program", mode=0o755)
    tarball = recipe.work / "closure.tar"
    pack(content, tarball, compression="none", progress=tell)
    unpack(tarball, root)
    tarball.unlink()
    leave_out_languages(next(root.glob("usr/lib/*/libicudata.so.*")), recipe)
    leave_out_names(content, root)
    return [Path(function.__code__.co_filename) for function in (closure, elf.resolve, names)]


def add_node(content: Closure, naive: Path) -> None:
    """Add node, its ELF interpreter and libraries, and the files whose names are written in its library."""
    loader = elf.Loader(naive)
    for loaded in loader.load(elf.resolve("/usr/bin/node", naive)):
        file = naive / loaded.path[1:]
        content.file(str(Path(loaded.path).with_name(Path(loaded.name).name)), file, NODE)
        if interpreter := loaded.elf.interpreter:
            real = elf.resolve(interpreter, naive)
            content.file(real, naive / real[1:], "the ELF interpreter")
            if merged(interpreter) != real:
                content.symlink(merged(interpreter), real, "the ELF interpreter")
        # Debian's node has parts of its JavaScript beside it, in packages of their own.
        for name in set(re.findall(rb"/usr/share/nodejs/[\w./-]+\.js\b", file.read_bytes())):
            script = elf.resolve(name.decode(), naive)
            if (naive / script[1:]).is_file():
                content.file(name.decode(), naive / script[1:], "a part of node")
    if loader.missing:
        raise BuildError("; ".join(map(str, loader.missing)))
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    content.file(certificates, naive / certificates[1:], "whom to trust behind https:")
    content.symlink("/usr/lib/ssl/cert.pem", certificates, "where OpenSSL looks for it")


def add_modules(content: Closure, naive: Path) -> None:
    """Add shout and the modules that it needs, without what is LEFT_OUT."""
    modules = naive / MODULES[1:]
    for file in sorted(path for path in modules.rglob("*") if path.is_file() and not path.is_symlink()):
        name = str(file.relative_to(modules))
        licence = re.match(r"(un)?licen[cs]e|copying|notice", file.name, re.IGNORECASE)
        if licence or not any(fnmatch(name.lower(), pattern) for pattern in LEFT_OUT):
            content.file(f"{MODULES}/{name}", file, "shout")


def leave_out_names(content: Closure, root: Path) -> None:
    """Leave out of node's libraries the names of functions that no program or library of the image asks for."""
    files = [root / entry.path[1:] for entry in content if entry.why == NODE]
    listed = {file: names([file]) for file in files}
    for file in files:
        others = set().union(*(found for other, found in listed.items() if other != file))
        try:
            file.write_bytes(without_names(file.read_bytes(), others))
        except NotThisOne as reason:
            print(f"{file.name} stays as it is: {reason}")


def leave_out_languages(library: Path, recipe: Recipe) -> None:
    """Make ICU's data library anew, with English only: its one symbol is an archive, of which icupkg makes a smaller.

    Asked for a language that is gone, node answers in English.
    Source: unicode-org.github.io/icu, "ICU Data"; node's own choice: BUILDING.md, --with-intl=small-icu.
    """
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    with library.open("rb") as file:
        opened = ELFFile(file)
        table = opened.get_section_by_name(".dynsym")
        assert isinstance(table, SymbolTableSection)
        symbol = next(one for one in table.iter_symbols() if re.fullmatch(r"icudt\d+_dat", one.name))
        file.seek(next(iter(opened.address_offsets(symbol["st_value"]))))
        data = file.read(symbol["st_size"])
    everything = recipe.work / f"{symbol.name.removesuffix('_dat')}{sys.byteorder[0]}.dat"
    everything.write_bytes(data)
    smaller = (
        recipe.work / "smaller" / everything.name
    )  # icupkg writes the name into the archive, and ICU asks for it
    smaller.parent.mkdir()
    listed, left_out = recipe.work / "listed.txt", recipe.work / "left-out.txt"
    with listed.open("w") as output:
        recipe.run("icupkg", "-l", everything, stdout=output)
    items = listed.read_text().split()
    left_out.write_text(
        "\n".join(
            item for item in items if any(re.fullmatch(pattern, item) for pattern in LANGUAGES_LEFT_OUT)
        )
    )
    recipe.run("icupkg", "--ignore-deps", "-r", left_out, everything, smaller)
    source = (
        f".section .rodata\n.balign 16\n.globl {symbol.name}\n.type {symbol.name}, %object\n"
        f'{symbol.name}: .incbin "{smaller}"\n.size {symbol.name}, . - {symbol.name}\n'
        '.section .note.GNU-stack, "", %progbits\n'
    )
    (recipe.work / "data.s").write_text(source)
    recipe.run("as", "-o", recipe.work / "data.o", recipe.work / "data.s")
    recipe.run("ld", "-shared", "-s", "-soname", library.name, "-o", library, recipe.work / "data.o")
