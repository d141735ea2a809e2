"""Hostile variants of files: bytes, trees of JSON and YAML, headers of safetensors, members of tars, pickles."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]

NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 10**13, 2**62, 2**63 - 1, 2**64, -(2**63), 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, False, "", "x", "x" * 5000, "../../../../etc/passwd", "/etc/passwd", "\x00", "nan", [], {},
    [[]], [None], [10**9] * 3, 0.5, -0.5, 1e308, float("nan"), float("inf"), {"a": 1}, list(range(300)),
    "__import__('os').system('id')", "custom=os:system", "kl=/etc", "http://127.0.0.1:9/x", "pipe:touch hacked",
)  # fmt: skip


class Evil:
    """Its pickle runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def flipped(data: bytes, rng: Rng) -> bytes:
    """One to eight bits, near the beginning half of the time."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        place = int(rng.integers(len(found) if rng.random() < 0.5 else min(len(found), 400)))
        found[place] ^= 1 << int(rng.integers(8))
    return bytes(found)


def cut(data: bytes, rng: Rng) -> bytes:
    """Cut short, or its beginning cut off, or a part left out."""
    a, b = sorted(int(x) for x in rng.integers(0, len(data) + 1, size=2))
    return (data[:a], data[a:], data[:a] + data[b:])[rng.integers(3)]


def repeated(data: bytes, rng: Rng) -> bytes:
    """A part of it twice, or zeros in its place, or random bytes."""
    a, b = sorted(int(x) for x in rng.integers(0, len(data) + 1, size=2))
    b = min(b, a + 4096)
    part = (data[a:b] * 2, bytes(b - a), rng.bytes(b - a))[rng.integers(3)]
    return data[:a] + part + data[b:]


def numbered(data: bytes, rng: Rng) -> bytes:
    """Eight bytes become an extreme number; often the first eight, which are lengths in many formats."""
    place = 0 if rng.random() < 0.3 else int(rng.integers(max(1, len(data) - 8)))
    number = NUMBERS[rng.integers(len(NUMBERS))] % 2**64
    return data[:place] + number.to_bytes(8, "little") + data[place + 8 :]


# ---- trees ----------------------------------------------------------------------------------------------------------


def tree(value: Any, rng: Rng) -> Any:
    """One node of plain values is replaced, removed or added."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    value = json.loads(json.dumps(value))
    walk(value)
    if not places or rng.random() < 0.02:
        return VALUES[rng.integers(len(VALUES))]
    node, key = places[rng.integers(len(places))]
    chance = rng.random()
    if chance < 0.7:
        node[key] = VALUES[rng.integers(len(VALUES))]
    elif chance < 0.8:
        del node[key]
    elif chance < 0.9 and isinstance(node[key], (int, float)):
        node[key] = -node[key] if rng.random() < 0.3 else type(node[key])(node[key] * 2 ** int(rng.integers(1, 12)))
    elif isinstance(node, dict):
        node[str(VALUES[rng.integers(len(VALUES))])] = node[key]
    else:
        node.append(node[key])
    return value


def json_tree(data: bytes, rng: Rng) -> bytes:
    """A file of JSON; now and then nested far too deep."""
    if rng.random() < 0.02:
        return b'{"format": ' + b"[" * 200_000
    return json.dumps(tree(json.loads(data), rng)).encode()


def yaml_tree(data: bytes, rng: Rng) -> bytes:
    """A file of YAML: trees, tags that name code, aliases that grow."""
    import yaml

    chance = rng.random()
    if chance < 0.05:
        return b"a: !!python/object/apply:os.system ['touch hacked']\n" + data
    if chance < 0.08:
        lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
        where = (b"name: *a39\n", b"data: {source: *a39}\n", b"training: *a39\n")[rng.integers(3)]
        return "\n".join(lines).encode() + b"\n" + where
    if chance < 0.1:
        return b"training: " + b"[" * 5000
    return yaml.safe_dump(tree(yaml.safe_load(data), rng), sort_keys=False).encode()


def safetensors_header(data: bytes, rng: Rng) -> bytes:
    """Names, types, shapes, offsets or metadata of a safetensors file; also the configuration within."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inside = header.get("__metadata__", {}).get("config")
    if inside and rng.random() < 0.3:
        header["__metadata__"]["config"] = json.dumps(tree(json.loads(inside), rng))
    else:
        header = tree(header, rng)
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# ---- archives -------------------------------------------------------------------------------------------------------


def tar_members(data: bytes, rng: Rng) -> bytes:
    """One member of a tar: another name, type, size or content; twice; or gone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=out, mode="w") as target:
        members = source.getmembers()
        chosen = int(rng.integers(len(members)))
        for number, member in enumerate(members):
            content = source.extractfile(member)
            body = content.read() if content is not None else b""
            if number == chosen:
                what = rng.integers(5)
                if what == 0:
                    names = ("../../hacked", "/tmp/hacked.webp", "", "x" * 300, ".hidden.webp", "99999999999.webp",
                             "-1.webp", "a/b/../../../c.jpg", "000000000.webp", "x.moments.npy", "ü.jpg")  # fmt: skip
                    member.name = names[rng.integers(len(names))]
                elif what == 1:
                    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
                    member.type, member.linkname = kinds[rng.integers(5)], "/etc/passwd"
                elif what == 2:
                    body = MEMBER[rng.integers(len(MEMBER))](body or b"x", rng)
                elif what == 3:
                    target.addfile(member, io.BytesIO(body))
                else:
                    continue
            member.size = len(body)
            target.addfile(member, io.BytesIO(body))
    return out.getvalue()


def array_header(data: bytes, rng: Rng) -> bytes:
    """A .npy file that claims another shape or type, or holds a pickle that runs a command."""
    if rng.random() < 0.3:
        out = io.BytesIO()
        np.save(out, np.array([Evil()], dtype=object), allow_pickle=True)
        return out.getvalue()
    shape = tuple(int(NUMBERS[i]) for i in rng.integers(0, 12, size=rng.integers(0, 4)))
    kind = ("<f2", "<f8", "|O", "<U9999999", "<c16")[rng.integers(5)]
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[128:]


MEMBER: tuple[Mutation, ...] = (flipped, cut, repeated, numbered, array_header)


def pickled(data: bytes, rng: Rng) -> bytes:
    """The pickle inside a file of torch.save runs a command, or is damaged."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            body = source.read(name)
            if name.endswith("data.pkl"):
                evil = pickle.dumps({"optimizer": Evil()}, protocol=2)
                body = evil if rng.random() < 0.2 else (flipped, cut, repeated)[rng.integers(3)](body, rng)
            target.writestr(name, body)
    return out.getvalue()


BYTES: tuple[Mutation, ...] = (flipped, cut, repeated, numbered)
STRUCTURE: dict[str, Mutation] = {
    ".json": json_tree, ".yaml": yaml_tree, ".safetensors": safetensors_header, ".tar": tar_members, ".pt": pickled
}  # fmt: skip


def mutated(name: str, data: bytes, rng: Rng) -> bytes:
    """A hostile variant of a file, by its suffix: three of four times of its structure, else of its bytes."""
    structure = STRUCTURE.get(os.path.splitext(name)[1])
    if structure is not None and rng.random() < 0.75:
        return structure(data, rng)
    return BYTES[rng.integers(len(BYTES))](data or b"x", rng)
