"""torchrun, for people: where a run was refused or stopped by an error it told, that error is the last line.

Takes torchrun's arguments. Ends with the status of the process that failed first; torchrun itself ends with
1, after a traceback of its own.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


def main() -> int:
    """Start the processes, wait for them, return the exit status."""
    # What it logs of processes that fail stands in the report below, where a report is needed.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args())
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if not isinstance(failure.message, dict):  # it died without telling why: see mtrl/last_words.py
            print(error.format_msg(), file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
