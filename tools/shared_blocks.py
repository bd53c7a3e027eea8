"""Keeps the deliberately repeated code of the scripts the same, character for character.

    python -m tools.shared_blocks check     lists every block that differs (CI does this)
    python -m tools.shared_blocks write     copies the canonical text over the others

A block stands between `# --- shared: <name> ---` and `# --- end shared ---`. There are two families
of scripts, of offline and of online methods; a block's canonical text is the one in the family's
script in CANONICAL, which runs. A script that must deviate says so and why in its fence,
`# --- forked: <name> (reason) ---`, and is listed in FORKS.
"""

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CANONICAL = dict(offline=ROOT / "meam.py", online=ROOT / "fmer.py")
TOP_LEVEL = [ROOT / f"{name}.py" for name in ("meam", "qam", "qam_edit", "qam_fql", "fmer")]
EACH = "run arguments", "many agents", "evaluate and main"
FORKS = {("baselines/rlpd.py", name) for name in EACH}  # (script, block)
FORKS |= {("baselines/ppo.py", name) for name in EACH} | {("baselines/dipo.py", "many agents")}

FENCE = re.compile(
    r"^ *# --- (?P<kind>shared|forked): (?P<name>[\w ]+?)(?: \([^\n]+\))? -+\n"
    r"(?P<text>.*?)^ *# --- end (?P=kind) -+\n",
    re.DOTALL | re.MULTILINE,
)


def scripts() -> list[Path]:
    """All method scripts that exist."""
    baselines = sorted((ROOT / "baselines").glob("[!_]*.py"))
    return [path for path in TOP_LEVEL if path.exists()] + baselines


def family(source: str) -> str:
    """Returns "online" if a script's text has the flag total_steps, which only online methods have,
    else "offline"."""
    return "online" if re.search(r"^    total_steps: \w", source, re.M) else "offline"


def named(kind: str) -> list[str]:
    """Paths, without .py, of a family's scripts."""
    found = [path for path in scripts() if family(path.read_text()) == kind]
    return [str(path.relative_to(ROOT).with_suffix("")) for path in found]


def blocks(source: str) -> dict[str, re.Match]:
    """name -> match of every shared or forked block in a script's text."""
    return {match["name"]: match for match in FENCE.finditer(source)}


def canonical_blocks() -> dict[str, dict[str, re.Match]]:
    """family -> its canonical blocks."""
    return {kind: blocks(path.read_text()) for kind, path in CANONICAL.items()}


def difference(source: str, name: str, canonical: re.Match, own: re.Match) -> str:
    """Says how a script's block differs from the canonical one in the script `source`."""
    theirs = canonical["text"].splitlines()
    lines = own["text"].splitlines()
    diff = "\n".join(difflib.unified_diff(theirs, lines, source, name, lineterm="", n=1))
    return (
        f"{name}: block '{own['name']}' differs from {source}. Edit it there and run "
        f"`python -m tools.shared_blocks write`.\n{diff}"
    )


def script_problems(path: Path, canonical: dict[str, re.Match]) -> list[str]:
    """Returns a text for every block of a script that is missing, unknown, different, or a fork
    that nobody declared."""
    text = path.read_text()
    source = CANONICAL[family(text)].name
    name = str(path.relative_to(ROOT))
    own = blocks(text)
    found = []
    opened = text.count("# --- shared:") + text.count("# --- forked:")
    if opened != len(own):
        found.append(f"{name}: a fence is not closed, or a block occurs twice")
    for block in canonical.keys() - own.keys():
        found.append(f"{name}: block '{block}' is missing")
    for block, match in own.items():
        if match["kind"] == "forked":
            if (name, block) not in FORKS:
                found.append(f"{name}: fork of '{block}' is not listed in FORKS")
        elif block not in canonical:
            found.append(f"{name}: block '{block}' does not exist in {source}")
        elif match["text"] != canonical[block]["text"]:
            found.append(difference(source, name, canonical[block], match))
    return found


def problems() -> list[str]:
    """Returns the problems of all scripts."""
    canonical = canonical_blocks()
    found = []
    for path in scripts():
        kind = family(path.read_text())
        found.extend(script_problems(path, canonical[kind]))
    return found


def write() -> list[str]:
    """Replaces every shared block by the canonical text; returns the changed scripts."""
    families = canonical_blocks()
    changed = []
    for path in scripts():
        old = path.read_text()
        canonical = families[family(old)]

        def replace(match: re.Match, canonical: dict[str, re.Match] = canonical) -> str:
            if match["kind"] == "forked" or match["name"] not in canonical:
                return match[0]
            start, end = (place - match.start() for place in match.span("text"))
            return match[0][:start] + canonical[match["name"]]["text"] + match[0][end:]

        new = FENCE.sub(replace, old)
        if new != old:
            path.write_text(new)
            changed.append(str(path.relative_to(ROOT)))
    return changed


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        print("changed:", ", ".join(write()) or "nothing")
    elif sys.argv[1:] == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)
