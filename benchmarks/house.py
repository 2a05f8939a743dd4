"""Is the house in order: imports, sizes, names and docstrings of the packages, read from the code itself.

Prints a line for each rule, and exits with 1 if one of them does not hold. Which folder may import which is checked by
import-linter; its contracts are in pyproject.toml.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "offload"

MOST_LINES = 400
LONGER_FILES: dict[str, str] = {}
"""Files that may be longer, and why."""

MOST_PARAMETERS = 8
"""Of a constructor, `self` not counted."""

FIRST_WORDS = frozenset(["of", "that", "for", "with", "by", "told", "brought", "kept", "put", "taken", "asked"])
"""A docstring that begins so is no sentence."""

OLD_NAMES = frozenset(
    [
        "pinned",
        "pinned_bytes",
        "pins",
        "host_memory",
        "kv_segments",
        "kv_shelves",
        "Temporaries",
        "temporaries",
        "count_temporaries",
        "Landing",
        "window",
        "windows",
        "kv_windows",
        "window_seconds",
        "UnitWindow",
        "HostWindow",
        "Windows",
        "WindowWork",
        "TrainingWindow",
        "Beginnings",
        "beginnings",
        "Guise",
        "guise",
        "Shelf",
        "shelf",
        "put_away",
        "has_turn",
        "bring",
        "Stretch",
        "stretch",
        "PagedTensor",
        "OwnAttention",
        "takes_own_attention",
        "ReusedMemory",
        "PageShape",
        "Pair",
        "PageStream",
        "KeepAll",
        "KvReserve",
        "ExpertPart",
        "KvPart",
        "TrainingPart",
        "decide",
        "Decision",
        "Experts",
        "Forecast",
        "forecast",
        "Order",
        "afterwards",
        "NotInParts",
        "DividedProduct",
        "divided",
        "host_percent",
        "RowFetching",
        "GatheredTable",
        "gathered",
        "ExpertCall",
        "ExpertStore",
        "RoutingRecord",
        "SlottedWeight",
        "ExpertStandIns",
        "stand_in",
        "stand_ins",
        "ManagedTraining",
        "managed",
        "TrainingNeeds",
        "kept_bytes",
        "set_aside_bytes",
        "Outlook",
        "Rounds",
        "_GivenUp",
        "Randomness",
        "Autocasts",
        "Frame",
        "InputStore",
        "put_by",
        "Kept",
        "Rule",
        "Working",
        "freeze",
        "thaw",
        "Learning",
        "learning",
        "evaluated",
        "Asked",
        "Planned",
        "Task",
        "Choice",
        "Home",
        "asked_for",
        "tell",
        "told",
        "notice",
        "beside",
        "apart",
        "in_parts",
        "kept_on",
        "own_seconds",
        "recall_twice",
        "brought_bytes",
    ]
)
"""Names that were wrong or of our own making, and have a standard one now."""

READS_OLD_FILES = frozenset({"scheduler/plan_json.py", "scheduler/hardware.py", "offload/report/schema.py"})
"""Files that name old keys to read them."""


@dataclass(frozen=True)
class Module:
    """One file of the packages."""

    path: Path
    name: str
    source: str
    tree: ast.Module

    @property
    def place(self) -> str:
        return str(self.path.relative_to(ROOT))


def modules() -> list[Module]:
    """Every file of the three folders, once."""
    found = []
    for folder in (PACKAGE, "scheduler", "storage"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in ((PACKAGE, "scheduler"), (PACKAGE, "storage")):
                continue  # the link to the folder beside
            name = ".".join(parts if parts[0] == PACKAGE else (PACKAGE, *parts)).removesuffix(".__init__")
            source = path.read_text()
            found.append(Module(path, name, source, ast.parse(source)))
    return found


def layers(found: list[Module]) -> list[str]:
    """What import-linter says against its contracts."""
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.partition("Broken contracts")[2] or done.stdout or done.stderr
    return [line for line in said.splitlines() if line.strip("- ")] if done.returncode else []


def cycles(found: list[Module]) -> list[str]:
    """Groups of modules that import one another, imports for type checkers left out."""
    names = {module.name for module in found}
    imports = {module.name: _imports(module, names) for module in found}
    groups = [group for group in _components(imports) if len(group) > 1]
    return [" <-> ".join(sorted(group)) for group in groups]


def long_files(found: list[Module]) -> list[str]:
    sizes = [(module.place, module.source.count("\n")) for module in found]
    return [f"{place}: {size} lines" for place, size in sizes if size > MOST_LINES and place not in LONGER_FILES]


def wide_constructors(found: list[Module]) -> list[str]:
    wide = []
    for module, owner, function in _methods(found):
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
        if function.name == "__init__" and count > MOST_PARAMETERS:
            wide.append(f"{module.place}: {owner.name} takes {count}")
    return wide


def repeated_classes(found: list[Module]) -> list[str]:
    counts = Counter(node.name for module in found for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))
    return [name for name, count in counts.items() if count > 1]


def docstrings(found: list[Module]) -> list[str]:
    wrong = []
    for module in found:
        for line, text in _docstrings(module):
            first = re.match(r"\W*(\w+)", text)
            if first is not None and first[1].lower() in FIRST_WORDS:
                wrong.append(f"{module.place}:{line}: {text.splitlines()[0][:80]}")
    return wrong


def session(found: list[Module]) -> list[str]:
    """`Session` is short, sets every attribute when it is made, and names no component."""
    wrong = [
        f"{module.place} names {name}"
        for module in found
        if module.name == f"{PACKAGE}.session.session"
        for _, name in _names(module.tree)
        if re.fullmatch(r"\w+Component", name)
    ]
    for module, owner, function in _methods(found):
        if owner.name != "Session" or function.name == "__init__":
            continue
        made = _stored(_constructor(owner))
        wrong += [f"{function.name} sets {name}" for name in _stored(function) if name not in made]
        if owner.end_lineno is not None and owner.end_lineno - owner.lineno >= MOST_LINES:
            wrong.append(f"{module.place}: Session has {owner.end_lineno - owner.lineno} lines")
    return sorted(set(wrong))


def old_names(found: list[Module]) -> list[str]:
    return [
        f"{module.place}:{line}: {name}"
        for module in found
        if module.place not in READS_OLD_FILES
        for line, name in _names(module.tree)
        if name in OLD_NAMES
    ]


RULES = {
    "imports run downward, components do not import each other": layers,
    "no import cycle": cycles,
    f"no file past {MOST_LINES} lines": long_files,
    f"no constructor past {MOST_PARAMETERS} parameters": wide_constructors,
    "each class name once": repeated_classes,
    "docstrings begin with a sentence": docstrings,
    "Session is short, sets its attributes when it is made, and names no component": session,
    "the field's names": old_names,
}


def main() -> int:
    found, broken = modules(), 0
    for rule, check in RULES.items():
        wrong = check(found)
        broken += bool(wrong)
        print(f"{'broken' if wrong else 'kept  '}  {rule}" + "".join(f"\n        {item}" for item in wrong))
    lines = sum(module.source.count("\n") for module in found)
    print(f"{len(found)} files, {lines:,} lines; {len(RULES) - broken} rules kept, {broken} broken")
    return int(broken > 0)


def _imports(module: Module, names: set[str]) -> set[str]:
    imported: set[str] = set()
    checked_only = {
        id(node)
        for branch in ast.walk(module.tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(module.tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= (inner & names) or {node.module}
    return (imported & names) - {module.name}


def _components(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Strongly connected ones (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in sorted(graph[node]):
            if following not in index:
                yield from visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            at = stack.index(node)
            yield stack[at:]
            del stack[at:]

    for node in graph:
        if node not in index:
            yield from visit(node)


def _methods(found: list[Module]) -> Iterator[tuple[Module, ast.ClassDef, ast.FunctionDef]]:
    for module in found:
        for owner in ast.walk(module.tree):
            if isinstance(owner, ast.ClassDef):
                yield from ((module, owner, node) for node in owner.body if isinstance(node, ast.FunctionDef))


def _constructor(owner: ast.ClassDef) -> ast.FunctionDef:
    return next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")


def _stored(function: ast.FunctionDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _docstrings(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield statement.lineno, text


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


if __name__ == "__main__":
    sys.exit(main())
