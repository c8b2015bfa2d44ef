"""Every causal LM of `transformers`, tiny and random, through all that this package does with
one: `python benchmarks/architectures.py [NAME ...] [--again]`.

Each type runs in a process of its own: attach; loss and gradient of whole, padded and packed rows;
save and load; greedy `generate` at draft lengths 0, 1 and 4 for single rows and batches; NextLat
and MTP; all against the library's own (`architecture_checks.py`). Besides the types as they are,
some are run with other settings (`tiny_models.VARIANTS`).

Results are kept in docs/architectures/results.json, one entry a type: stopped anywhere, the same
command goes on where it was. Entries of other versions of the libraries or of this package's source
are made again, and all of them with --again. The table docs/architectures.md is written from them.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.generation.utils  # slow to import, and shared by the processes

import nextlat
from architecture_checks import Report, check, in_a_line
from tiny_models import NAMES, TYPES, tiny_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "architectures" / "results.json"
TABLE = ROOT / "docs" / "architectures.md"
TIMEOUT = 120.0
STATES = {
    "wrong": "wrong: other output, another gradient, or an error that is not a refusal",
    "drafts": "trains, drafts and verifies: the output is the library's at every draft length",
    "plain": "trains, and decodes without drafts with the library's output",
    "trains": "trains; is not decoded here",
    "refused": "is refused when an objective is attached",
    "not built": "no tiny model could be built",
}


def versions() -> dict[str, str]:
    """What an entry depends on."""
    source = hashlib.sha256()
    package, unrelated = Path(nextlat.__file__).parent, {"tasks", "report", "training", "serving"}
    ours = [Path(__file__).with_name(f"{n}.py") for n in ("architecture_checks", "tiny_models")]
    theirs = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in unrelated]
    for path in [*sorted(theirs), *ours]:
        source.update(path.read_bytes())
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "nextlat": nextlat.__version__,
        "source": source.hexdigest()[:16],
    }


# ---- one process a type ----


def run(name: str) -> dict[str, Any]:
    """The entry of one type, whatever becomes of its process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs))
    begun = time.perf_counter()
    process.start()
    theirs.close()
    entry: dict[str, Any] = {}
    ends = f"hangs for {TIMEOUT:.0f} s"
    try:
        while ours.poll(max(0.0, begun + TIMEOUT - time.perf_counter())):
            entry = ours.recv()
    except EOFError:
        process.join(10)
        ends = f"dies with status {process.exitcode}" if process.exitcode else ""
    if ends:
        entry.setdefault("wrong", []).append(f"{ends} at: {entry.get('stage')}")
    process.kill()
    process.join()
    return entry | {"seconds": round(time.perf_counter() - begun, 1)}


def _child(name: str, pipe: Any) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    warnings.simplefilter("ignore")
    report = Report(pipe.send)
    try:
        lm = tiny_model(name)
    except Exception as error:
        report.set(not_built=in_a_line(error))
    else:
        parameters = sum(p.numel() for p in lm.parameters())
        report.set(model=type(lm).__name__, parameters=parameters)
        check(lm, report)
    report.set(stage="done")
    pipe.close()


# ---- the table ----


def state(entry: dict[str, Any]) -> str:
    """One of `STATES`."""
    if entry.get("wrong"):
        return "wrong"
    if "not_built" in entry:
        return "not built"
    if "refused" in entry or "whole rows" not in entry["trains"]:
        return "refused"
    decodes = entry.get("NextLat", {}).get("decodes", {})
    return "drafts" if decodes.keys() - {"0"} else "plain" if decodes else "trains"


def _mtp(entry: dict[str, Any]) -> str:
    mtp = entry.get("MTP", {})
    if not mtp or "cannot" in mtp:
        return "no"
    return "drafts" if mtp.get("decodes", {}).keys() - {"0"} else "trains"


def _notes(entry: dict[str, Any]) -> Iterator[str]:
    """What there is to say about a type, each thing once."""
    for name in ("not_built", "refused"):
        if name in entry:
            yield entry[name]
    yield from entry.get("wrong", ())
    refusals = dict(entry.get("refusals", {}))
    refusals.pop("packed rows", None)  # has a column of its own
    for what, sentence in refusals.items():
        yield f"{what}: {sentence}"
    for what, sentence in entry.get("library_fails", {}).items():
        yield f"the library itself fails on {what}: {sentence}"
    for sentences in entry.get("NextLat", {}).get("refused", {}).values():
        yield from sentences.values()


def table(entries: dict[str, Any], of: dict[str, str]) -> str:
    """docs/architectures.md."""
    found = {name: state(entry) for name, entry in entries.items()}
    counts = Counter(found[name] for name in entries if name in TYPES)
    variants = Counter(found[name] for name in entries if name not in TYPES)
    lines = [
        "# Architectures",
        "",
        "What this package does with every causal LM of `transformers`, found out on a tiny random "
        "model of each and compared with the library's own loss, gradient and output. Written by "
        "`python benchmarks/architectures.py`; do not edit.",
        "",
        f"transformers {of['transformers']}, torch {of['torch']}, nextlat {of['nextlat']}; "
        f"{len(entries)} of {len(NAMES)} run.",
        "",
        "| | | types | variants |",
        "|---|---|---:|---:|",
        *(f"| {s} | {words} | {counts[s]} | {variants[s]} |" for s, words in STATES.items()),
        f"| | | **{counts.total()}** | **{variants.total()}** |",
        "",
        "*Batches*: rows of a batch share a forward pass while they draft, or are decoded one by "
        "one. *Packs*: several documents in one training row. *MTP*: what multi-token "
        "prediction, which repeats the last layer, does with it.",
    ]
    for s in STATES:
        names = sorted(name for name in entries if found[name] == s)
        if not names:
            continue
        lines += ["", f"## {s.capitalize()}", ""]
        lines += ["| type | model | batches | packs | MTP | |", "|---|---|---|---|---|---|"]
        for name in names:
            entry = entries[name]
            batches = "" if s != "drafts" else "together" if entry.get("together") else "one by one"
            notes = "; ".join(dict.fromkeys(_notes(entry))).replace("|", "\\|")
            trained = s in ("drafts", "plain", "trains")
            packs = ("yes" if entry.get("packs") else "no") if trained else ""
            cells = [name, entry.get("model", ""), batches, packs, _mtp(entry) if trained else ""]
            lines.append(f"| {' | '.join(cells)} | {notes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every type and variant")
    parser.add_argument("--again", action="store_true", help="also what is up to date")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"not a type or variant: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    of = versions()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    entries = kept.get("entries", {}) if args.names or kept.get("versions") == of else {}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in args.names or NAMES:
        if name in entries and not (args.again or args.names):
            continue
        entries[name] = entry = run(name)
        print(f"{name}: {state(entry)} ({entry['seconds']} s)", flush=True)
        for sentence in entry.get("wrong", ()):
            print(f"    {sentence}", flush=True)
        entries = {name: entries[name] for name in NAMES if name in entries}
        RESULTS.write_text(json.dumps({"versions": of, "entries": entries}, indent=1) + "\n")
    TABLE.write_text(table(entries, of))
    wrong = sum(state(entry) == "wrong" for entry in entries.values())
    print(f"{len(entries)} entries, {wrong} wrong, {TABLE.relative_to(ROOT)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
