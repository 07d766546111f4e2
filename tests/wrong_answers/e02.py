"""Answers that somebody might give to the exercises of notebook 02; each must fail."""

OPEN = "def leads_out(tarball):\n    with tarfile.open(tarball) as tar:\n        members = list(tar)\n"
PACK = """
def pack_files(files, tarball):
    with gzip.GzipFile({header}) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name in {order}:
            info = tarfile.TarInfo(name)
            info.mtime, info.uid = {time}, {owner}
            info.size, info.mode = files[name].stat().st_size, {mode}
            tar.addfile(info, io.BytesIO(files[name].read_bytes()))
"""
RIGHT = {
    "header": 'filename="", mode="wb", fileobj=open(tarball, "wb"), mtime=0',
    "order": "sorted(files)",
    "time": "0",
    "owner": "0",
    "mode": "0o755 if os.access(files[name], os.X_OK) else 0o644",
}


def packed(**wrong: str) -> str:
    """The packer with one mistake."""
    return PACK.format(**(RIGHT | wrong))


LOADED = (
    "def smallest(program):\n    first, *libraries = elf.Loader().load(os.path.realpath(program))\n"
    "    asked = first.elf.interpreter\n    files = {program: first.path}\n"
)
ALL_LIBRARIES = "for x in libraries:\n        files[f'{os.path.dirname(x.path)}/{x.name}'] = x.path"

WRONG: dict[str, list[str]] = {
    "02.1": [
        f"{OPEN}    return [m.name for m in members]",
        f"{OPEN}    return [m.name for m in members if '..' in m.name or m.name.startswith('/')]",
        f"{OPEN}    return [m.name for m in members if m.name.startswith(('/', '../'))]",
        f"{OPEN}    return [m.name for m in members if m.name.startswith('/') or '..' in m.name.split('/')]",
        f"{OPEN}    return [m.name for m in members if m.name.startswith('/') or '..' in (m.name + m.linkname)]",
        f"{OPEN}    return [m.name for m in members if (m.name + m.linkname).startswith('/')"
        " or '..' in (m.name + '/' + m.linkname).split('/')]",
        f"{OPEN}    def out(path, top=''):\n"
        "        return path[:1] == '/' or posixpath.normpath(top + path)[:2] == '..'\n"
        "    return [m.name for m in members if out(m.name) or (m.islnk() and out(m.linkname))\n"
        "            or (m.issym() and m.linkname[:1] != '/' and out(m.linkname, posixpath.dirname(m.name) + './'))]",
        "def leads_out(tarball):\n    return ['../../etc/passwd']",
        "def leads_out(tarball):\n    return True",
        "def leads_out(tarball):\n    os._exit(0)",
    ],
    "02.2": [
        packed(header='tarball, "wb"'),
        packed(header='filename="", mode="wb", fileobj=open(tarball, "wb")'),
        packed(header='filename=tarball.name, mode="wb", fileobj=open(tarball, "wb"), mtime=0'),
        packed(order="files"),
        packed(order="sorted(files, key=lambda name: files[name].stat().st_mtime)[1:]"),
        packed(time="files[name].stat().st_mtime"),
        packed(mode="0o644"),
        packed(mode="0o755"),
        packed(time="0; files = dict(files); files[name] = Path('/dev/null')"),
        'def pack_files(files, tarball):\n    tarball.write_bytes(gzip.compress(b"", mtime=0))',
        'def pack_files(files, tarball):\n    with tarfile.open(tarball, "w:gz") as tar:\n'
        "        for name in sorted(files):\n            tar.add(files[name], name)",
        'def pack_files(files, tarball):\n    with tarfile.open(tarball, "w") as tar:\n        pass',
        "def pack_files(files, tarball):\n    return True",
    ],
    "02.3": [
        f"{LOADED}    return files",
        f"{LOADED}    files[asked] = os.path.realpath(asked)\n    return files",
        f"{LOADED}    {ALL_LIBRARIES}\n    return files",
        f"{LOADED}    files[asked] = os.path.realpath(asked)\n    {ALL_LIBRARIES}\n"
        "    files['/etc/passwd'] = '/etc/passwd'\n    return files",
        f"{LOADED}    files[asked] = os.path.realpath(asked)\n    {ALL_LIBRARIES}\n    return files",
        "def smallest(program):\n    return {program: '/no/such/file'}",
        "def smallest(program):\n    return {'../x': program}",
        "def smallest(program):\n    return {'/bin/hello': '/bin/sh'}",
        "def smallest(program):\n    return True",
    ],
}
