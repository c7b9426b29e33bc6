"""The rewards that come with mtrl: 1.0 for a right completion, 0.0 for a wrong one.

They read ``completion.text``, which is the decoded completion without the end-of-sequence token.
"""

import re
from decimal import Decimal

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import ConfigError

# A minus belongs to the number unless something stands before it that it could subtract from.
_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
)


def exact_match(prompt: Prompt, completion: Completion) -> float:
    """1.0 if text and answer are the same words; runs of white space count as one blank, none at the ends."""
    return float(completion.text.split() == prompt.answer.split())


def numeric_match(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the last number of the text equals the last number of the answer ("1,234.50" is 1234.5).

    Raises `ConfigError` if the answer holds no number: the reward does not fit the data.
    """
    answer = last_number(prompt.answer)
    if answer is None:
        raise ConfigError(
            f"reward numeric_match: the answer {prompt.answer!r:.60} of prompt {prompt.prompt_id} holds "
            "no number; use exact_match, or give numeric answers"
        )
    return float(last_number(completion.text) == answer)


def last_number(text: str) -> Decimal | None:
    """Return the last number written in the text, or None.

    >>> last_number("3 apples and 1,200.50 pears.")
    Decimal('1200.50')
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
