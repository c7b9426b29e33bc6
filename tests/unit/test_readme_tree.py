"""The tree in README.md is the tree on disk."""

import re
from pathlib import PurePosixPath

import pytest

from tests import house
from tests.house import ROOT

pytestmark = pytest.mark.one_stack

BLOCK = re.compile(r"<!-- tree -->\s*```\w*\n(.*?)```\s*<!-- /tree -->", re.S)


def paths_in_tree(block: str) -> list[str]:
    """The paths of an annotated tree; a folder ends with a slash.

    A line is names, two blanks or more, and an annotation. Names stand under the folder that the indentation
    says; box characters count as indentation. A line that begins with ``#`` is a remark.
    """
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        plain = re.sub(r"[│├└─]", " ", line)
        indent = len(plain) - len(plain.lstrip())
        names = re.split(r"\s{2,}", plain.strip())[0].replace(",", " ").split()
        if not names or names[0].startswith("#"):
            continue
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        paths += [parent + name for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            folders.append((indent, parent + names[0]))
    return paths


def readme_paths() -> list[str]:
    readme = ROOT / "README.md"
    assert readme.exists(), "there is no README.md"
    match = BLOCK.search(readme.read_text())
    assert match, "README.md has no fenced tree between <!-- tree --> and <!-- /tree -->"
    return paths_in_tree(match[1])


@pytest.mark.parametrize(
    "block",
    [
        "a/    letters\n  b.py c.py   two\n  d/\n    e.py  deep\nf.py\n",
        "a/\n├── b.py     one\n├── c.py     two\n└── d/\n    └── e.py  deep\nf.py\n# a remark\n",
    ],
)
def test_a_tree_is_read_by_its_indentation(block: str) -> None:
    assert paths_in_tree(block) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.py", "f.py"]


def test_every_path_in_the_readme_tree_exists() -> None:
    wrong = [
        path
        for path in readme_paths()
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert not wrong


def test_the_readme_tree_names_every_python_file_of_the_first_two_levels() -> None:
    listed = set(readme_paths())
    files = [
        path
        for path in house.python_files()
        if len(PurePosixPath(path).parts) <= 2 and not path.endswith("__init__.py")
    ]
    assert not [path for path in files if path not in listed]


def test_the_readme_tree_names_every_folder_of_the_first_level() -> None:
    listed = set(readme_paths())
    folders = {f"{path.split('/')[0]}/" for path in house.files() if "/" in path and not path.startswith(".")}
    assert not sorted(folders - listed)
