"""Counts lines of code: those with a token that is no comment and no docstring.

Usage: `python tests/lines_of_code.py FOLDER`
"""

import ast
import sys
import tokenize
from pathlib import Path

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count(file: Path) -> int:
    """Counts the lines of code of a file."""
    with file.open("rb") as stream:
        tokens = [
            token for token in tokenize.tokenize(stream.readline) if token.type not in NO_CODE
        ]
    lines = {number for token in tokens for number in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def main() -> None:
    """Prints a line for each file, and the sum."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    counts = {file: count(file) for file in sorted(folder.rglob("*.py"))}
    for file, lines in counts.items():
        print(f"{lines:5} {file.relative_to(folder)}")
    print(f"{sum(counts.values()):5} lines of code in {len(counts)} files")


if __name__ == "__main__":
    main()
