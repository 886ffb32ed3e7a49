"""The counter of lines of code counts code alone."""

from pathlib import Path

from lines_of_code import count

CODE = '''"""A docstring
of two lines."""

# A comment.
import os  # with a comment


class Thing:
    """A docstring."""

    text = """a string
    that is no docstring"""

    def method(
        self,
    ):
        """Another.

        Of three lines.
        """

        return (
            os
        )
'''


def test_docstrings_comments_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "thing.py"
    file.write_text(CODE, encoding="utf-8")
    assert count(file) == 10
