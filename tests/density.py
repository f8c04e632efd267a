"""Measure how dense alignfreeze.py is and where its heart ends; test_density.py sets limits.

python tests/density.py
"""

import ast
import io
import keyword
import tokenize
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "alignfreeze.py"


def measure(text: str) -> dict[str, float]:
    """Return {what: number} for the text of a script."""
    lines, names = text.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):  # a line of code
            names.setdefault(token.start[0], 0)
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
            names[token.start[0]] += 1
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    where = {node.name: node for node in functions}
    longest = max(functions, key=size)
    return {
        "lines": len(lines),
        "lines over 100 columns": sum(len(line) > 100 for line in lines),
        "mean names in a line of code": sum(names.values()) / len(names),
        f"lines of the longest function, {longest.name}": size(longest),
        "line where contrastive_loss begins": where["contrastive_loss"].lineno,
        "line where the heart (sections 1 to 3) ends": heart_ends(lines),
    }


def size(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def heart_ends(lines: list[str]) -> int:
    """Return the last line of section 3, without the blank lines behind it."""
    end = next(k for k, line in enumerate(lines) if line.startswith("# ---- 4."))
    while not lines[end - 1]:
        end -= 1
    return end


if __name__ == "__main__":
    for what, value in measure(SCRIPT.read_text("utf-8")).items():
        print(f"{value:8.3g}" if isinstance(value, float) else f"{value:8}", what)
