"""The seed of each completion; pure.

vLLM on CPU draws on every rank of an engine from that rank's own generators, and several engines share
nothing: only a seed that is a function of *what* is sampled keeps ranks together, replicas apart and
a resumed run on the path of one that was never stopped.
"""

import hashlib


def completion_seed(*, seed: int, policy_version: int, prompt_id: int, sample_index: int) -> int:
    """Return a seed in ``[0, 2**63)``, the same on every machine and Python version.

    >>> completion_seed(seed=1, policy_version=0, prompt_id=7, sample_index=0)
    5306337112899530577
    """
    text = f"{seed}/{policy_version}/{prompt_id}/{sample_index}".encode("ascii")
    digest = hashlib.blake2b(text, digest_size=8, person=b"mtrl.sample").digest()
    return int.from_bytes(digest, "little") >> 1
