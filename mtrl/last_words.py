"""What a refused or stopped run leaves behind: the error once on the terminal, without a traceback.

torchrun starts many processes that often fail alike, ends all others as soon as one has ended, and then
prints a report of its own; the error goes into that too, by way of torchrun's error file.
"""

import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from mtrl.parallel.errors import CheckpointError, ConfigError, MismatchError, MtrlError, NonFiniteError

EXIT_STATUS = 2
"""Of every process whose run was refused or stopped by an error of mtrl's."""

GRACE_S = 20.0
"""How long a process that leaves the telling to another stays: torchrun would end that one with it."""

_RAISED_ON_EVERY_RANK = (MismatchError, NonFiniteError, CheckpointError, ConfigError)


def is_first_of_node() -> bool:
    """Whether this process speaks for its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def tell(error: MtrlError, *, has_started: bool) -> int:
    """Print ``error`` where it is this process's to tell, note it for torchrun; return the exit status.

    Before the ranks have met (``has_started`` false) those of a node read the same and fail alike, so one
    tells it, and one on each node, whose files may differ. Afterwards an error may be of one rank alone.
    """
    is_shared = not has_started or isinstance(error, _RAISED_ON_EVERY_RANK)
    if is_shared and not is_first_of_node():
        time.sleep(GRACE_S)
        return EXIT_STATUS
    text = f"{type(error).__name__}: {error}"
    rank = os.environ.get("RANK", "0")
    print(text if is_shared or rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # As torch.distributed.elastic writes it; without it torchrun reports "to enable traceback see ...".
        note = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": note}), encoding="utf-8")
    return EXIT_STATUS


def leave(error: Exception) -> NoReturn:
    """Tell ``error``, which came after the ranks had met, and end this process at once.

    At once, because the destructors of an engine and of process groups may wait for ranks that have gone,
    and print much after the error. Errors that are not mtrl's keep their traceback and end with 1.
    """
    status = 1
    if isinstance(error, MtrlError):
        status = tell(error, has_started=True)
    else:
        if re.search("Connection (reset|closed) by peer", str(error)):
            # The peer has the error, and torchrun ends this process as soon as the peer has told it.
            time.sleep(GRACE_S)
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
