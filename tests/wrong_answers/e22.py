"""Answers that somebody might give to the exercises of notebook 22; each must fail."""

START = (
    "def extend(path, old, new, files):\n    layout = Layout.open(path)\n    below = layout.image(old)\n"
    "    added = layout.add_layer_from(io.BytesIO(layer(files)))\n"
)
HISTORY = "history=[*(line['created_by'] for line in below.settings['history']), new]"
MAKE = f"settings=below.settings['config'], created=CREATED, {HISTORY}, tag=new)\n"
READ = "def dig(path, tag, name):\n    layout = Layout.open(path)\n    for one in layout.image(tag).layers:\n"

WRONG: dict[str, list[str]] = {
    "22.1": [
        "def extend(path, old, new, files):\n    layout = Layout.open(path)\n"
        "    layout.tag(new, layout.image(old).manifest)",
        f"{START}    layout.add_image([added], {MAKE}",
        f"{START}    layout.add_image([added, *below.layers], {MAKE}",
        f"{START}    layout.add_image([*below.layers, added], created=CREATED, {HISTORY}, tag=new)",
        f"{START}    layout.add_image([*below.layers, added], {MAKE.replace(HISTORY, 'history=[new]')}",
        f"{START}    layout.add_image([*below.layers, added], {MAKE.replace('tag=new', 'tag=old')}",
        f"{START}    for blob in (layout.path / 'blobs/sha256').iterdir():\n"
        "        if blob.name not in added.blob.digest:\n"
        "            blob.unlink()",
        f"{START}    bad = Layer(added.blob, 'sha256:' + '0' * 64)\n    layout.add_image([*below.layers, bad], {MAKE}",
        f"{START}    twice = layout.add_layer_from(io.BytesIO(layer(files)), 'none')\n"
        f"    layout.add_image([*below.layers, added, twice], {MAKE}",
        f"{START}    layout.add(b'rubbish', 'text/plain')\n    layout.add_image([*below.layers, added], {MAKE}",
        "def extend(path, old, new, files):\n    layout = Layout.open(path)\n    below = layout.image(old)\n"
        "    added = layout.add_layer_from(io.BytesIO(layer({'etc/motd': files['etc/motd']})))\n"
        f"    layout.add_image([*below.layers, added], {MAKE}",
    ],
    "22.2": [
        "def unused(path):\n    return set()",
        "def unused(path):\n    return None",
        "def unused(path):\n    return {one.name for one in (path / 'blobs/sha256').iterdir()}",
        "def unused(path):\n    return {f'sha256:{one.name}' for one in (path / 'blobs/sha256').iterdir()}",
        "def unused(path):\n    layout = Layout.open(path)\n"
        "    needed = {one.digest for one in layout.tags().values()}\n"
        "    return {f'sha256:{one.name}' for one in (path / 'blobs/sha256').iterdir()} - needed",
        "def unused(path):\n    layout = Layout.open(path)\n    needed = set()\n    for tag in layout.tags():\n"
        "        image = layout.image(tag)\n        needed |= {image.manifest.digest}\n"
        "        needed |= {one.blob.digest for one in image.layers}\n"
        "    return {f'sha256:{one.name}' for one in (path / 'blobs/sha256').iterdir()} - needed",
        "def unused(path):\n    layout = Layout.open(path)\n    needed = set()\n    for tag in ['moved']:\n"
        "        image = layout.image(tag)\n        needed |= {image.manifest.digest, image.config.digest}\n"
        "        needed |= {one.blob.digest for one in image.layers}\n"
        "    return {f'sha256:{one.name}' for one in (path / 'blobs/sha256').iterdir()} - needed",
    ],
    "22.3": [
        "def dig(path, tag, name):\n    return None",
        "def dig(path, tag, name):\n    return ''",
        "def dig(path, tag, name):\n    layout = Layout.open(path)\n    found = []\n"
        "    for one in layout.image(tag).layers:\n        with layout.tarball(one, 1 << 20) as archive:\n"
        "            for member in archive:\n                if member.name == name:\n"
        "                    found.append(archive.read(member.size).decode())\n    return found[-1]",
        # one layer too high, where the file has been replaced and is deleted in the end
        "def dig(path, tag, name):\n    layout = Layout.open(path)\n    found = ['']\n"
        "    for one in layout.image(tag).layers:\n        with layout.tarball(one, 1 << 20) as archive:\n"
        "            for member in archive:\n                if member.name == name:\n"
        "                    found.append(archive.read(member.size).decode())\n    return found[:3][-1]",
        f"{READ}        with layout.tarball(one, 1 << 20) as archive:\n            for member in archive:\n"
        "                return archive.read(member.size).decode()",
        READ.replace("image(tag).layers", "image(tag).layers[::-1]")
        + "        with layout.tarball(one, 1 << 20) as archive:\n            for member in archive:\n"
        "                if member.kind == 'file':\n                    return archive.read(member.size).decode()",
    ],
}
