"""Which Megatron-Core is installed, for the few places where its interfaces differ by version."""

from importlib.metadata import PackageNotFoundError, version

from mtrl.parallel.errors import MissingPackageError


def _installed() -> tuple[int, int]:
    try:
        major, minor = version("megatron-core").split(".")[:2]
    except PackageNotFoundError as error:
        raise MissingPackageError("megatron-core is not installed; run: pip install megatron-core") from error
    return int(major), int(minor)


MEGATRON_0_19 = _installed() >= (0, 19)
