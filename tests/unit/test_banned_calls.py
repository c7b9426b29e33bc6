"""No file can run what it reads: what unpickles, evaluates or starts a shell is not in the repository.

Names are followed through imports (``from torch import load as read``), and to name a banned function is
enough: it need not be called. What is put together at run time (``getattr(torch, "lo" + "ad")``) is not seen.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house import PRODUCT, python_files, tree_of

pytestmark = pytest.mark.one_stack

MODULES = {
    *("pickle", "_pickle", "cPickle", "pickletools", "copyreg", "marshal", "shelve", "dbm"),
    *("dill", "cloudpickle", "joblib", "jsonpickle", "hickle"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
FUNCTIONS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.serialization.load"),
    *("torch.serialization.save", "torch.package.PackageImporter", "torch.utils.model_zoo.load_url"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path"),
    *("numpy.load", "numpy.lib.format.read_array", "pandas.read_pickle", "yaml.YAML"),
}
# Object collectives pickle; any function or method of these names is one.
COLLECTIVES = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_objects?(_list)?|\w+_object_list")
# All but safe_load, safe_load_all and the safe loaders.
YAML = re.compile(r"yaml\.((full_|unsafe_)?load(_all)?|C?(Full|Unsafe)?Loader)")
SAFE_KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}

# Megatron's torch_dist format is pickle inside; one file reads it, through a list of what it may name;
# one test makes such files, good and evil.
PICKLING = ("pickle", "torch.load", "torch.save", "weights_only=False")
ALLOWED = {"mtrl/checkpoint/torch_dist.py": PICKLING, "tests/unit/test_torch_dist_files.py": PICKLING}


def forbidden(path: str, tree: ast.Module) -> list[tuple[int, str]]:
    """What is banned in that file and not allowed there."""
    allowed = ALLOWED.get(path, ())
    prefixes = tuple(f"{name}." for name in allowed)
    return [
        (line, name) for line, name in banned(tree) if name not in allowed and not name.startswith(prefixes)
    ]


def banned(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name of everything banned in a file."""
    origin = dict(imported_names(tree))
    found = [(line, name) for line, name in imports(tree) if name.split(".")[0] in MODULES or is_banned(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, origin)
            is_read = isinstance(node.ctx, ast.Load)  # a config section has a field called eval
            if is_read and (is_banned(name) or (isinstance(node, ast.Name) and name in BUILTINS)):
                found.append((node.lineno, name))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, name) for name in banned_arguments(node, full_name(node.func, origin))]
    return found


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module, function or class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What each imported name of the file stands for: ``np`` for ``numpy``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def full_name(node: ast.expr, origin: dict[str, str]) -> str:
    """``numpy.load`` for ``np.load``; for what begins with no name, its end: ``().save`` is ``.save``."""
    if isinstance(node, ast.Name):
        return origin.get(node.id, node.id)
    return f"{full_name(node.value, origin)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def is_banned(name: str) -> bool:
    """Whether a full name is of a banned function, or leads into a banned module."""
    *above, last = name.split(".")
    return (
        name in FUNCTIONS
        or (name.startswith("builtins.") and last in BUILTINS)
        or bool(COLLECTIVES.fullmatch(last) or YAML.fullmatch(name))
        or any(part in MODULES for part in above)
        or (bool(above) and last in MODULES)
    )


def banned_arguments(call: ast.Call, name: str) -> Iterator[str]:
    """The arguments that make a harmless function a banned one."""
    for keyword in call.keywords:
        given, safe = keyword.value, SAFE_KEYWORDS.get(keyword.arg or "")
        # The two others may be passed on: they are judged where they are written down.
        is_judged = isinstance(given, ast.Constant) or keyword.arg in ("shell", "allow_pickle")
        if safe is not None and is_judged and ast.unparse(given) != str(safe):
            yield f"{keyword.arg}={ast.unparse(given)}"
    module = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    is_import = name.endswith(("import_module", "run_module"))
    if is_import and str(module).partition(".")[0] in MODULES:
        yield str(module)


@pytest.mark.parametrize("path", python_files())
def test_no_file_unpickles_evaluates_or_starts_a_shell(path: str) -> None:
    found = forbidden(path, tree_of(path))
    assert not found, f"{path}: {found}"


def test_the_package_is_among_the_files_that_are_looked_at() -> None:
    assert {path.split("/")[0] + "/" for path in python_files(*PRODUCT)} == set(PRODUCT)
    assert set(python_files(*PRODUCT)) < set(python_files())


BANNED = """
from pickle import loads
import dill as json
import os, pickle
import pickle.whatever
def f(): import pickle
importlib.import_module('pickle')
runpy.run_module('pickle.x')
__import__('os')
torch.serialization.pickle.loads(b)
multiprocessing.reduction.pickle
eval('1')
exec(code)
compile(text, 'f', 'exec')
run = eval
map(eval, lines)
import builtins; builtins.exec(c)
from builtins import eval as harmless
torch.load(path)
torch.load(path, weights_only=True)
torch.save(x, path)
import torch as t; t.load(p)
from torch import load
from torch import save as keep
read = torch.load
load_state(p, weights_only=False)
yaml.load(text)
yaml.load(text, Loader=yaml.SafeLoader)
yaml.full_load(text)
yaml.unsafe_load(text)
yaml.load_all(text)
yaml.unsafe_load_all(text)
import yaml as y; y.full_load_all(t)
from yaml import load
yaml.compose(text, Loader=yaml.Loader)
yaml.UnsafeLoader
np.load(p, allow_pickle=True)
f(allow_pickle=flag)
import numpy as np; np.load(p)
from numpy import load
dist.all_gather_object(a, b)
dist.gather_object(a)
dist.broadcast_object_list(a)
torch.distributed.scatter_object_list(a, b)
dist.send_object_list(a)
dist.recv_object_list(a)
group.broadcast_object(a)
gather = dist.gather_object
from torch.distributed import all_gather_object as gather
os.system(line)
from os import system
import os as o; o.popen(line)
subprocess.run(line, shell=True)
subprocess.run(line, shell=flag)
Popen(line, shell=1)
subprocess.getoutput(line)
runpy.run_path(p)
AutoModel.from_pretrained(p, trust_remote_code=True)
"""
HARMLESS = """
model.eval()
import torch
Section(eval=path)
class Section: eval = None
re.compile(pattern)
from re import compile as pattern
torch.compile(f)
yaml.safe_load(text)
yaml.compose(text, Loader=yaml.SafeLoader)
json.load(file)
json.loads(text, object_pairs_hook=f)
registry.load(name)
self.exec(line)
subprocess.run([a, b], shell=False)
subprocess.run([a, b])
dist.all_gather(a, b)
np.save(p, allow_pickle=False)
from_pretrained(p, trust_remote_code=False)
from_pretrained(p, trust_remote_code=config.trust_remote_code)
'pickle'
importlib.import_module(name)
an_object = 1
"""


@pytest.mark.parametrize("code", [f"import {module}" for module in sorted(MODULES)])
def test_each_banned_module_is_found(code: str) -> None:
    assert banned(ast.parse(code))


@pytest.mark.parametrize("code", BANNED.strip().splitlines())
def test_each_banned_thing_is_found(code: str) -> None:
    assert banned(ast.parse(code))


@pytest.mark.parametrize("code", HARMLESS.strip().splitlines())
def test_what_is_harmless_is_not_found(code: str) -> None:
    assert not banned(ast.parse(code))


def test_the_reader_of_torch_dist_may_unpickle_and_nothing_else() -> None:
    pickling = ast.parse("import pickle, torch; pickle.Unpickler(f); torch.load(p, weights_only=False)")
    assert not forbidden("mtrl/checkpoint/torch_dist.py", pickling)
    assert len(forbidden("mtrl/checkpoint/save.py", pickling)) == 4
    for code in (
        "eval(text)",
        "os.system(line)",
        "import dill",
        "dist.gather_object(a)",
        "torch.jit.load(p)",
    ):
        tree = ast.parse(code)
        assert forbidden("mtrl/checkpoint/torch_dist.py", tree) == banned(tree) != []
