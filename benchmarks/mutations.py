"""What can happen to a file of a run: mutations for fuzz.py, by the file's format, each drawn from
a random generator."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MARK = "executed"  # a file beside the run, which hostile code leaves
Slot = tuple[Any, Any]  # container, key


@dataclass
class Mutation:
    """What was done to a file; `structural`: no reader may take the result for a whole one."""

    kind: str
    structural: bool = False


NEST, HUGE, NOT_A_NUMBER = "@nest", "@huge", "@nan"  # what json.dumps does not write
NUMBERS = [-1, 0, 1, 3, 2**31, 2**63, 10**12, 10**400, 1e308, 0.5, HUGE, NOT_A_NUMBER]
STRINGS = [
    "",
    "\ud83d",
    "x" * 10**6,
    "../../../etc/passwd",
    "\x1b[2J\r\n",
    "/dev/zero",
    "[/b]$|<b>",
]
OTHERS = [None, True, False, 7, -2.5, "word", [], {}, [1, "a"], {"a": 1}, NEST, [[]], 10**30]


CHANGES = ["type", "dropped", "swapped", "renamed", "number", "number", "string", "repeated"]
TENSOR_CHANGES = ["dropped", "renamed", "left over", "shape", "dtype", "integers"]
TENSOR_CHANGES += ["swapped", "not finite"]  # which leave them whole
DAMAGE = ["truncated", "truncated", "bit", "bit", "bit", "zeros", "inserted", "missing", "empty"]
DAMAGE += ["a directory", "another kind", "another run's", "byte-order mark"]


def slots(content: Any) -> Iterator[Slot]:
    keys: list[Any] = []
    if isinstance(content, dict | list):
        keys = [*content] if isinstance(content, dict) else [*range(len(content))]
    for key in keys:
        yield content, key
        yield from slots(content[key])


def change(content: Any, rng: random.Random) -> tuple[Any, str]:
    """Change one thing in JSON-like content, in place where it has places."""
    all_slots = list(slots(content))
    if not all_slots or rng.random() < 0.03:
        return rng.choice(OTHERS), "replaced"
    kind = rng.choice(CHANGES)
    if kind == "number":
        some = [s for s in all_slots if type(s[0][s[1]]) in (int, float)]
    elif kind == "string":
        some = [s for s in all_slots if isinstance(s[0][s[1]], str)]
    elif kind == "renamed":
        some = [s for s in all_slots if isinstance(s[0], dict)]
    else:
        some = all_slots
    if not some:
        some, kind = all_slots, "type"
    holder, key = rng.choice(some)
    if kind == "type":
        holder[key] = rng.choice([x for x in OTHERS if type(x) is not type(holder[key])])
    elif kind == "dropped":
        del holder[key]
    elif kind == "swapped":
        other, place = rng.choice(all_slots)
        holder[key], other[place] = other[place], holder[key]
    elif kind == "renamed":
        holder[f"{key}_"] = holder.pop(key)
    elif kind in ("number", "string"):
        holder[key] = rng.choice(NUMBERS if kind == "number" else STRINGS)
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    else:
        holder[f"more {rng.random()}"] = holder[key]
    return content, f"{kind} {str(key)[:40]}"


def dumps(content: Any) -> str:
    try:
        text = json.dumps(content)
    except (ValueError, RecursionError):  # a value was put inside itself
        text = "{}"
    deep = "[" * 100_000 + "]" * 100_000
    for mark, value in ((NEST, deep), (HUGE, "1e999"), (NOT_A_NUMBER, "NaN")):
        text = text.replace(f'"{mark}"', value)
    return text


def mark_of(path: Path) -> Path:
    run = next(folder for folder in path.parents if (folder / "run.json").exists())
    return run.with_name(MARK)


def change_json(path: Path, rng: random.Random) -> Mutation:
    if path.name in ("config.json", "tokenizer_config.json") and rng.random() < 0.1:
        return hostile_config(path)
    content, kind = change(json.loads(path.read_text()), rng)
    path.write_text(dumps(content), encoding="utf-8", errors="surrogatepass")
    return Mutation(kind)


def hostile_config(path: Path) -> Mutation:
    """Classes of the directory's own, as `trust_remote_code` would take them."""
    (path.parent / "hostile.py").write_text(
        f"open({str(mark_of(path))!r}, 'w')\nclass Hostile:\n    pass\n"
    )
    content = json.loads(path.read_text())
    names = ("AutoConfig", "AutoModelForCausalLM")
    content["auto_map"] = (
        {name: "hostile.Hostile" for name in names}
        if path.name == "config.json"
        else {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    )
    content["model_type" if path.name == "config.json" else "tokenizer_class"] = "Hostile"
    path.write_text(json.dumps(content))
    return Mutation("hostile class")


def change_lines(path: Path, rng: random.Random) -> Mutation:
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    if path.suffix == ".jsonl":
        content, kind = change(json.loads(lines[number]), rng)
        lines[number] = dumps(content)
    else:
        kind = rng.choice(["dropped line", "repeated line", "garbled line", "path"])
        line = lines.pop(number)
        lines += {
            "dropped line": [],
            "repeated line": [line, line],
            "garbled line": [line[:-1]],
            "path": [line.replace("  ", "  ../")],
        }[kind]
    path.write_text("".join(f"{line}\n" for line in lines))
    return Mutation(kind)


def change_tensors(path: Path, rng: random.Random) -> Mutation:
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    x = tensors[name]
    kind = rng.choice(TENSOR_CHANGES)
    if kind in ("dropped", "renamed"):
        del tensors[name]
    if kind in ("renamed", "left over"):
        tensors[f"{name}_"] = x.clone()
    elif kind == "shape":
        tensors[name] = rng.choice([x[:-1].clone(), x.reshape(-1, 1), torch.cat([x, x])])
    elif kind == "dtype":
        tensors[name] = x.to(rng.choice([torch.float64, torch.bfloat16]))
    elif kind == "integers":
        tensors[name] = x.to(torch.int32)
    elif kind == "swapped":
        other = rng.choice([n for n, y in sorted(tensors.items()) if y.shape == x.shape])
        tensors[name], tensors[other] = tensors[other].clone(), x.clone()
    elif kind == "not finite":
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([np.nan, np.inf])
    save_file(tensors, path, metadata={"format": "pt"})
    return Mutation(f"{kind} {name}", structural=kind not in ("swapped", "not finite"))


class Hostile:
    """A pickle that runs code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def change_state(path: Path, rng: random.Random) -> Mutation:
    """A file that torch.save wrote."""
    state = torch.load(path, weights_only=False)
    if rng.random() < 0.15:
        torch.save({"state": Hostile(mark_of(path))}, path)
        return Mutation("hostile pickle", structural=True)
    tensors = [s for s in slots(state) if isinstance(s[0][s[1]], torch.Tensor)]
    if tensors and rng.random() < 0.5:
        holder, key = rng.choice(tensors)
        x, kind = holder[key], rng.choice(["dropped", "shape", "dtype", "list"])
        if kind == "dropped":
            del holder[key]
        else:
            holder[key] = {
                "shape": torch.cat([x.reshape(-1)] * 2),
                "dtype": x.to(torch.complex64 if x.is_floating_point() else torch.float16),
                "list": x.tolist(),
            }[kind]
        kind = f"{kind} {key}"
    else:
        state, kind = change(state, rng)
    torch.save(state, path)
    return Mutation(kind, structural=kind.startswith("shape"))


def change_arrays(path: Path, rng: random.Random) -> Mutation:
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    name = rng.choice(sorted(arrays))
    kind = rng.choice(["dropped", "renamed", "shape", "objects", "text", "not finite", "empty"])
    x = arrays.pop(name)
    if kind == "objects":
        x = np.array([Hostile(mark_of(path))], dtype=object)
    elif kind != "dropped":
        changed = {"shape": x.reshape(-1, 1), "text": x.astype(str), "empty": x[:0]}
        x = changed.get(kind, x * np.nan if kind == "not finite" else x)
    if kind != "dropped":
        arrays[f"{name}_" if kind == "renamed" else name] = x
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return Mutation(f"{kind} {name}")


def change_bytes(path: Path, rng: random.Random, foreign: Path) -> Mutation:
    """What can happen to any file."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    kind = rng.choice(DAMAGE)
    if kind == "truncated":
        del content[place:]
    elif kind == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == "inserted":
        content[place:place] = rng.randbytes(rng.choice([1, 4, 4096]))
    elif kind == "empty":
        content.clear()
    elif kind == "another kind":
        others = [p for p in path.parent.iterdir() if p.is_file() and p.suffix != path.suffix]
        content[:] = rng.choice(sorted(others)).read_bytes()
    elif kind == "another run's":
        content[:] = foreign.read_bytes()
    elif kind == "byte-order mark":
        content[:0] = b"\xef\xbb\xbf"
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content)
    return Mutation(kind)


BY_FORMAT: dict[str, Callable[[Path, random.Random], Mutation]] = {
    ".json": change_json,
    ".jsonl": change_lines,
    "": change_lines,  # checksums
    ".safetensors": change_tensors,
    ".pt": change_state,
    ".pth": change_state,
    ".npz": change_arrays,
}


def mutate(path: Path, rng: random.Random, foreign: Path) -> Mutation:
    if rng.random() < 0.35:
        return change_bytes(path, rng, foreign)
    return BY_FORMAT[path.suffix](path, rng)
