"""Mutation test of the derivations: change one number or one sign in a derivation, and the chapter must fail.

    python tests/mutations.py [--sample COUNT] [--limit SECONDS] [CHAPTER ...]

A derivation is a code cell tagged `derivation` in the source of a chapter (`:tags: [derivation]`). Each mutant of such
a cell differs from it in one place:

* a number: an integer k becomes k + 1, a float k becomes 1.05 k (0.0 becomes 1.0);
* a sign: a unary minus is dropped, a binary + and - are exchanged (also in += and -=);
* a factor: * and / are exchanged (also in *= and /=).

The chapter is run up to the cell; then, in a fork, the mutant and every later derivation cell. An exception kills the
mutant. If none comes, the mutant *survives*: a number or a sign in the derivation does not matter to its checks. A
mutant that uses more than its limit of CPU time is reported as *timed out*, and counts as not killed.

Left alone, because another value there gives another check of the same statement, and not a wrong statement:

1. **strings**, f-strings with all they hold included: names of symbols, printed lines;
2. **test points**: numbers in what a `for` statement runs over, if its body has an `assert` (comprehensions and loops
   that compute something are mutated);
3. **tolerances**: a float of at most 0.01 that stands alone on one side of < or <= in an assert, and the arguments
   named abs, rel, atol, rtol, epsabs, epsrel;
4. **working precision**: arguments of `evalf` and `workdps`, arguments named dps, and the value assigned to a `.dps`;
5. **planted errors**: an assert that something wrong fails (`!=`, `not …`, `abs(…) > …`); so would another wrong one.

Of the cells that are not derivations only those run that a derivation needs (by the names they bind), and nothing is
displayed, glued or plotted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import json
import os
import random
import resource
import signal
import symtable
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tools import notebooks  # noqa: E402

LIMIT = 60  # seconds of CPU time for one mutant, the later derivations included
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
TOLERANCES = {"abs", "rel", "atol", "rtol", "epsabs", "epsrel", "dps"}
PRECISIONS = {"evalf", "workdps"}


class Mutant(NamedTuple):
    """One change in one derivation cell: what the report needs, and the changed code."""

    chapter: str
    cell: int  # number among the code cells, from 1
    line: int  # in the cell, from 1
    text: str  # that line
    change: str
    code: ast.Module
    fate: str = ""

    def __str__(self) -> str:
        where = f"{self.chapter}, code cell {self.cell}, line {self.line}"
        return f"{where}: {self.change} in `{self.text.strip()}`: {self.fate}"


# -------------------------------------------------------------- the mutants


def left_alone(tree: ast.Module) -> set[int]:
    """Identities of the nodes that are not mutated, by the rules of the module's docstring."""
    spared: set[int] = set()

    def spare(*roots):
        for root in roots:
            spared.update(id(node) for node in ast.walk(root))

    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            spare(node)
        elif isinstance(node, ast.For) and any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
            spare(node.iter)
        elif isinstance(node, ast.Assert) and _says_no(node.test):
            spare(node)
        elif isinstance(node, ast.Assert):
            for test in ast.walk(node.test):
                if isinstance(test, ast.Compare) and all(isinstance(op, (ast.Lt, ast.LtE)) for op in test.ops):
                    sides = [test.left, *test.comparators]
                    spare(
                        *(
                            s
                            for s in sides
                            if isinstance(s, ast.Constant) and type(s.value) is float and s.value <= 0.01
                        )
                    )
        elif isinstance(node, ast.Call):
            spare(*(word.value for word in node.keywords if word.arg in TOLERANCES))
            if getattr(node.func, "attr", None) in PRECISIONS:
                spare(*node.args)
        elif isinstance(node, ast.Assign) and any(getattr(target, "attr", None) == "dps" for target in node.targets):
            spare(node.value)
    return spared


def _says_no(test: ast.expr) -> bool:
    """Whether an assert holds because something is wrong."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return False
    size = isinstance(test.left, ast.Call) and getattr(test.left.func, "id", None) == "abs"
    return isinstance(test.ops[0], ast.NotEq) or size and isinstance(test.ops[0], (ast.Gt, ast.GtE))


def sites(tree: ast.Module) -> list[ast.AST]:
    """The nodes that a mutant changes, in the order of `ast.walk`."""
    spared = left_alone(tree)

    def mutable(node):
        if isinstance(node, ast.Constant):
            return type(node.value) in (int, float)
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, ast.USub)
        return isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPS

    return [node for node in ast.walk(tree) if id(node) not in spared and mutable(node)]


def mutate(tree: ast.Module, index: int) -> tuple[ast.Module, str, int]:
    """A copy of the code with its `index`-th site changed, what was changed, and on which line."""
    tree = copy.deepcopy(tree)
    node = sites(tree)[index]
    if isinstance(node, ast.Constant):
        old = node.value
        node.value = old + 1 if isinstance(old, int) else 1.05 * old or 1.0
        return tree, f"{old!r} -> {node.value!r}", node.lineno
    if isinstance(node, ast.UnaryOp):
        change = f"{ast.unparse(node)} -> {ast.unparse(node.operand)}"
        for parent in ast.walk(tree):
            for field, value in ast.iter_fields(parent):
                if value is node:
                    setattr(parent, field, node.operand)
                elif isinstance(value, list):
                    value[:] = [node.operand if item is node else item for item in value]
        return tree, change, node.lineno
    old = type(node.op)
    node.op = SWAPS[old]()
    line = node.right.lineno if isinstance(node, ast.BinOp) else node.lineno
    operand = ast.unparse(node.right if isinstance(node, ast.BinOp) else node.value)
    return tree, f"{SIGNS[old]} {operand} -> {SIGNS[type(node.op)]} {operand}", line


# -------------------------------------------------------------- the chapter


def is_derivation(cell) -> bool:
    return "derivation" in cell.metadata.get("tags", [])


def mutants(path: Path) -> list[Mutant]:
    """All mutants of all derivations of the chapter whose source is `path`."""
    found = []
    for number, cell in enumerate(notebooks.code_cells(notebooks.source_notebook(path)), start=1):
        if is_derivation(cell):
            tree, lines = ast.parse(cell.source), cell.source.splitlines()
            for index in range(len(sites(tree))):
                code, change, line = mutate(tree, index)
                found.append(Mutant(path.stem, number, line, lines[line - 1], change, code))
    return found


class _Generators(ast.NodeTransformer):
    """Every comprehension as a generator, with a scope of its own in every Python (3.12 inlines the others)."""

    def visit_ListComp(self, node):
        return self.generic_visit(ast.GeneratorExp(node.elt, node.generators))

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node):
        return self.generic_visit(ast.GeneratorExp(ast.Tuple([node.key, node.value], ast.Load()), node.generators))


def names(source: str) -> tuple[set[str], set[str]]:
    """Global names that a cell needs from earlier cells, and those it binds."""
    needed, bound = set(), set()
    for statement in ast.parse(source).body:
        reads, writes = set(), set()
        tables = [symtable.symtable(ast.unparse(_Generators().visit(statement)), "cell", "exec")]
        while tables:
            table = tables.pop()
            tables += table.get_children()
            for symbol in table.get_symbols():
                if table.get_type() == "module" or symbol.is_global():
                    if symbol.is_referenced():
                        reads.add(symbol.get_name())
                    if symbol.is_assigned() or symbol.is_imported():
                        writes.add(symbol.get_name())
        needed |= reads - bound
        bound |= writes
    return needed, bound


def slice_of(cells: list, wanted: set[int]) -> list[int]:
    """Numbers (from 1) of the cells that have to run for the `wanted` ones to run."""
    needed, kept = set(), []
    for number in range(len(cells), 0, -1):
        reads, writes = names(cells[number - 1].source)
        if number in wanted or writes & needed:
            needed = (needed - writes) | reads
            kept.append(number)
    return kept[::-1]


# ----------------------------------------------------------------- the runs


def quiet() -> None:
    """Make display, glue and plots harmless for code that runs outside of a notebook."""
    import matplotlib

    matplotlib.use("Agg")
    import IPython.display
    import matplotlib.pyplot as plt
    import myst_nb

    plt.show = lambda *args, **options: plt.close("all")
    myst_nb.glue = IPython.display.display = lambda *args, **options: None


def run_code(code: ast.Module | str, namespace: dict) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "<cell>", "exec"), namespace)


def fate(code: ast.Module, later: list[str], namespace: dict, limit: float) -> str:
    """Run a mutant and what comes after it in a fork: `killed`, `survived` or `timed out`."""
    pid = os.fork()
    if pid == 0:
        verdict = 1
        try:
            # CPU time, because the machine may be busy; and a generous time on the clock, should it hang.
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(10 * limit))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            for part in [code, *later]:
                run_code(part, namespace)
        except BaseException:  # noqa: BLE001
            verdict = 0
        finally:
            os._exit(verdict)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "timed out" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL) else "killed"
    return "killed" if os.WEXITSTATUS(status) == 0 else "survived"


def run_chapter(path: Path, sample: int | None = None, limit: float = LIMIT) -> Iterator[Mutant]:
    """The mutants of a chapter, with their fates; or, with `sample`, that many of one derivation cell.

    The sample depends on the name of the chapter only. Raises whatever the chapter itself raises.
    """
    cells = notebooks.code_cells(notebooks.source_notebook(path))
    wanted = {number for number, cell in enumerate(cells, start=1) if is_derivation(cell)}
    chosen = mutants(path)
    if sample is not None and chosen:
        draw = random.Random(path.stem)
        number = draw.choice(sorted({mutant.cell for mutant in chosen}))
        chosen = [mutant for mutant in chosen if mutant.cell == number]
        chosen = draw.sample(chosen, min(sample, len(chosen)))
    if not chosen:
        return
    last = max(mutant.cell for mutant in chosen)
    order = slice_of(cells, wanted if sample is None else {number for number in wanted if number <= last})
    namespace = {"__name__": "__main__"}
    for place, number in enumerate(order):
        if number > last:
            break
        later = [cells[n - 1].source for n in order[place + 1 :]]
        for mutant in chosen:
            if mutant.cell == number:
                yield mutant._replace(fate=fate(mutant.code, later, namespace, limit))
        run_code(cells[number - 1].source, namespace)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mutation test of the derivation cells.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder (default: that of this file)")
    parser.add_argument("--sample", type=int, help="only so many mutants, of one cell, a chapter")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of CPU time a mutant (default: {LIMIT})")
    parser.add_argument("--json", action="store_true", help="print one JSON object a chapter")
    parser.add_argument("chapter", nargs="*", help="such as 07 or 07_real_heads (default: all)")
    options = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(1)  # a fork inherits no threads
    quiet()
    bad = 0
    os.chdir(options.root / "chapters")
    for path in notebooks.chapters(options.root.resolve(), options.chapter):
        start, outcomes = time.perf_counter(), []
        try:
            for mutant in run_chapter(path, options.sample, options.limit):
                outcomes.append(mutant)
                if mutant.fate != "killed" and not options.json:
                    print(mutant, flush=True)
            failure = ""
        except Exception as error:  # noqa: BLE001
            failure = f"{path.stem} fails without any mutation: {type(error).__name__}: {error}"
        alive = [str(mutant) for mutant in outcomes if mutant.fate != "killed"]
        bad += len(alive) + bool(failure)
        seconds = round(time.perf_counter() - start, 1)
        if options.json:
            report = {"chapter": path.stem, "mutants": len(outcomes), "alive": alive, "failure": failure}
            print(json.dumps(report | {"seconds": seconds}), flush=True)
        else:
            print(
                f"{path.stem}: {len(outcomes)} mutants, {len(alive)} not killed, {seconds:.0f} s {failure}", flush=True
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
