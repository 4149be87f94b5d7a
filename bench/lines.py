"""Print the lines of code of the core and of each shelf in Markdown: python -m bench.lines.

Blank lines, comments and docstrings are not counted.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = "api/auth.py", "api/guards.py", "accounts/", "tokens/", "models.py"
FOLDERS = "api", "ops", "accounts", "tokens", "mail", "lib", "tests"
SHELVES = {
    f"**the core**: {', '.join(f'`{path}`' for path in CORE)}": [
        f"project/{path}" for path in CORE
    ],
    **{f"`project/{folder}/`": [f"project/{folder}/"] for folder in FOLDERS},
    **{f"`{path}`": [path] for path in ("project/*.py", "manage.py", "bench/")},
}
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def count(source: str) -> int:
    """Return the number of lines of code in Python source."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def table() -> dict[str, int]:
    """Return the number of lines of code of the core and of each shelf."""
    files = {
        shelf: [file for path in paths for file in ROOT.glob(path + "**/*.py" * path.endswith("/"))]
        for shelf, paths in SHELVES.items()
    }
    return {shelf: sum(count(file.read_text()) for file in found) for shelf, found in files.items()}


if __name__ == "__main__":
    print("| Shelf | Lines of code |\n|---|---|")
    print("\n".join(f"| {shelf} | {lines:,} |" for shelf, lines in table().items()))
