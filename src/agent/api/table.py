# SPDX-License-Identifier: MIT
"""Reads and writes functions.tbl, the table of the CUDA driver's functions.

The table is text. `#` starts a comment line. Three kinds of other lines:

    toolkit CUDA_VERSION
        The newest toolkit that the table was refreshed from, as cuda.h writes it: 13010 is CUDA 13.1. A newer one
        may have more than the table.

    type NAME = C_TYPE
        A type that a function takes by value and that gpu/cuda_types.h does not define: what stands for it in
        generated code. Size and register class must be those of the real type (an enum is `int`).

    CLASS C_PROTOTYPE
        One function. CLASS is one of CLASSES below, C_PROTOTYPE is as in cuda.h, on one line, without a `;`.
        A function of which no prototype is known is written `opaque NAME`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

CLASSES = {
    "wrap": "a hand-written wrapper bn_wrap_NAME exists in the agent",
    "gate": "generated wrapper: enter the gate, call the driver, leave the gate",
    "pass": "generated wrapper without a gate: never touches a GPU and never waits for one",
    "opaque": "prototype unknown: an untyped jump to the driver",
}

# Words of C that may stand in a type besides its name.
QUALIFIERS = ("const", "volatile", "struct", "enum", "union")
BASE_TYPES = ("void", "char", "short", "int", "long", "signed", "unsigned", "float", "double", "size_t")


class TableError(Exception):
    """A line of the table that cannot be read; the message names file and line."""


@dataclass
class Param:
    """One parameter: its type as written, name, and array suffix (`[]`, or empty)."""

    type: str
    name: str
    suffix: str = ""

    def text(self):
        space = "" if self.type.endswith("*") else " "
        return f"{self.type}{space}{self.name}{self.suffix}"


@dataclass
class Function:
    name: str
    cls: str
    ret: str = ""
    params: list = field(default_factory=list)

    @property
    def typed(self):
        return self.ret != ""

    def signature(self):
        """What makes two prototypes the same function to a caller; None without a prototype."""
        return (self.ret, tuple(p.type + p.suffix for p in self.params)) if self.typed else None

    def prototype(self):
        if not self.typed:
            return self.name
        args = ", ".join(p.text() for p in self.params) or "void"
        space = "" if self.ret.endswith("*") else " "
        return f"{self.ret}{space}{self.name}({args})"


@dataclass
class Table:
    functions: dict = field(default_factory=dict)  # name -> Function, in the file's order
    types: dict = field(default_factory=dict)  # name -> C type that stands for it
    toolkit: int = 0  # newest CUDA_VERSION that it covers

    def names(self, cls=None):
        return [f.name for f in self.functions.values() if cls is None or f.cls == cls]


def normal_type(text):
    """One spelling for a type: single spaces, stars at the end without spaces between them."""
    text = re.sub(r"\s+", " ", text.replace("*", " * ")).strip()
    words, stars = [], ""
    for word in text.split(" "):
        if word == "*":
            stars += "*"
        elif stars:
            # `char *const *`: keep a qualifier behind a star where it is.
            words.append(stars + word)
            stars = ""
        else:
            words.append(word)
    result = " ".join(words)
    if stars:
        result += ("" if result.endswith("*") else " ") + stars
    if result == "unsigned":
        result = "unsigned int"
    return result


def parse_param(text, index):
    text = text.strip()
    suffix = ""
    match = re.search(r"(\[\s*\w*\s*\])\s*$", text)
    if match:
        suffix = re.sub(r"\s+", "", match.group(1))
        text = text[: match.start()].strip()
    match = re.match(r"^(.*?[\s*])(\w+)$", text, re.S)
    words = re.findall(r"\w+", text)
    real = [w for w in words if w not in QUALIFIERS]
    named = match is not None and len(real) > 1 and real[-1] not in BASE_TYPES
    if named:
        return Param(normal_type(match.group(1)), match.group(2), suffix)
    return Param(normal_type(text), f"arg{index}", suffix)


def parse_prototype(text):
    """(return type, name, [Param]) of a C prototype without function pointers in it."""
    text = re.sub(r"\s+", " ", text).strip().rstrip(";").strip()
    match = re.match(r"^(.*?[\s*])(\w+)\s*\(([^()]*)\)$", text)
    if not match:
        raise TableError(f"not a prototype: {text}")
    ret, name, args = match.groups()
    args = args.strip()
    params = []
    if args not in ("", "void"):
        params = [parse_param(a, i) for i, a in enumerate(args.split(","))]
    return normal_type(ret), name, params


def load(path):
    """The Table in the file `path`; raises TableError."""
    table = Table()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        where = f"{path}:{number}"
        if word == "toolkit":
            if not rest.isdecimal():
                raise TableError(f"{where}: write `toolkit CUDA_VERSION`")
            table.toolkit = int(rest)
            continue
        if word == "type":
            name, sign, target = (s.strip() for s in rest.partition("="))
            if sign != "=" or not re.fullmatch(r"\w+", name) or not target:
                raise TableError(f"{where}: write `type NAME = C_TYPE`")
            table.types[name] = target
            continue
        if word not in CLASSES:
            raise TableError(f"{where}: unknown class `{word}`, use one of {', '.join(CLASSES)}")
        if re.fullmatch(r"\w+", rest):
            function = Function(rest, word)
        else:
            try:
                ret, name, params = parse_prototype(rest)
            except TableError as error:
                raise TableError(f"{where}: {error}") from None
            function = Function(name, word, ret, params)
        if not function.typed and function.cls != "opaque":
            raise TableError(f"{where}: {function.name} has no prototype, so its class must be `opaque`")
        if function.name in table.functions:
            raise TableError(f"{where}: {function.name} is listed twice")
        table.functions[function.name] = function
    return table


def type_name(text):
    """The name that carries a type: `const CUuuid *` -> `CUuuid`; None for C's own types."""
    words = [w for w in re.findall(r"\w+", text) if w not in QUALIFIERS]
    if any(w in BASE_TYPES for w in words):
        return None
    return words[0] if words else None


def header_types(path):
    """Names of the types that a header of ours defines."""
    text = re.sub(r"/\*.*?\*/", " ", Path(path).read_text(encoding="utf-8"), flags=re.S)
    names = set(re.findall(r"\btypedef\b[^;{}()]*?\b(\w+)\s*;", text))
    names |= set(re.findall(r"^\}\s*(\w+)\s*;", text, re.M))
    names |= set(re.findall(r"\btypedef\b[^;{}]*?\(\s*\*\s*(\w+)\s*\)", text))
    return names
