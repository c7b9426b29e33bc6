"""``docs/config.md`` from the config's sections and the texts under their fields.

Run it as::

    python tools/config_reference.py            write it
    python tools/config_reference.py --check    exit 1 if it is not current
"""

import argparse
import ast
import inspect
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, "") and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mtrl import config as config_module  # noqa: E402
from mtrl import config_acceleration, config_engines  # noqa: E402
from mtrl.config import Config  # noqa: E402
from mtrl.config_types import Section, describe, hints, section_of, sections  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
_HEAD = """# The config

Made by `python tools/config_reference.py` from `mtrl/config.py`, `mtrl/config_engines.py` and
`mtrl/config_acceleration.py`; edit there.

A config is a YAML file. `mtrl/train.py FILE section.key=value ...` reads it, lays the overrides over
it and checks the result: an unknown key, a wrong type or a number out of range is refused with file,
line and what is needed. `${section.key}` stands for another key's value. `--dry-run` checks and stops.
Paths are relative to the folder the command is started in.
"""


def field_texts() -> dict[type[Section], dict[str, str]]:
    """Section -> field name -> the text under the field in the module that defines it."""
    return {
        getattr(module, node.name): _texts_of(node)
        for module in (config_module, config_engines, config_acceleration)
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ClassDef)
    }


def _texts_of(node: ast.ClassDef) -> dict[str, str]:
    texts: dict[str, str] = {}
    for statement, after in zip(node.body, node.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_text:
            texts[statement.target.id] = inspect.cleandoc(after.value.value)  # type: ignore[attr-defined]
    return texts


def render() -> str:
    """The whole page, as Markdown."""
    texts = field_texts()
    return "\n".join([_HEAD, *(_render_section(section, texts[section]) for section in sections(Config))])


def _render_section(section: type[Section], texts: dict[str, str]) -> str:
    title = f"`{section.key}`" if section.key else "Top level"
    rows = [
        f"| `{spec.name}` | {_cell(describe(hint))} | {_default(spec)} | {_cell(texts[spec.name])} |"
        for spec, hint in zip(fields(section), hints(section).values(), strict=True)  # type: ignore[arg-type]
        if section_of(hint) is None
    ]
    head = [f"## {title}", "", _cell(inspect.cleandoc(section.__doc__ or "")), ""]
    return "\n".join([*head, "| key | takes | default | |", "|---|---|---|---|", *rows, ""])


def _default(spec: Any) -> str:
    if spec.default is MISSING:
        return "**needed**"
    is_bare_text = isinstance(spec.default, str) and spec.default
    return f"`{spec.default if is_bare_text else json.dumps(spec.default)}`"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="docs/config.md from the config's sections")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is not current")
    page = render()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not current; run python tools/config_reference.py")


if __name__ == "__main__":
    main()
