"""Which cases of a file this session runs, so that a fixture prepares no others."""

from typing import Any

import pytest


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of a parameter in the selected tests of the requesting file, once each."""
    items: list[Any] = [each for each in request.session.items if hasattr(each, "callspec")]
    calls = [item.callspec.params for item in items if item.path == request.path]
    return list(dict.fromkeys(params[name] for params in calls if name in params))
