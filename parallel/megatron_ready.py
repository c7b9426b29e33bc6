"""Import this before anything of ``megatron``: it makes Megatron-Core importable and right on this machine.

Ruff sorts megatron's imports after ours (pyproject.toml), so one import of this module, direct or through
``groups``, is enough.
"""

from importlib.metadata import PackageNotFoundError, version

from mtrl.parallel import host, megatron_mends
from mtrl.parallel.errors import MissingPackageError


def _installed() -> tuple[int, int]:
    try:
        major, minor = version("megatron-core").split(".")[:2]
    except PackageNotFoundError as error:
        raise MissingPackageError("megatron-core is not installed; run `make env`") from error
    return int(major), int(minor)


MEGATRON_0_19 = _installed() >= (0, 19)

host.install()
megatron_mends.install()
