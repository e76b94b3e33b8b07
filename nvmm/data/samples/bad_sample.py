"""A sample that cannot be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 2000
"""Characters of a reason that are kept: a message may quote a whole record."""


class BadSample(ValueError):  # noqa: N818  # the sample is bad, not the program
    """One broken sample, which the loader skips, counts and logs once (or stops at).

    Builders and decoders raise it for damaged or unusable members, and `blamed` makes it of
    whatever else they raise. A read that may work at the next attempt (OSError: a lost connection,
    a missing file) is no bad sample.

    source: shard and key, `shard:key`. reason: the fault, for the message. Both can be printed:
    half characters, which no file or terminal takes, are escaped.
    """

    def __init__(self, source: str, reason: str) -> None:
        self.source, self.reason = (
            text.encode("utf-8", "backslashreplace").decode() for text in (source, reason)
        )
        if len(self.reason) > _LONGEST:
            self.reason = self.reason[: _LONGEST - 4] + " ..."
        super().__init__(f"{self.source}: {self.reason}")

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.source, self.reason)


@contextmanager
def blamed(source: str) -> Iterator[None]:
    """Make whatever the block raises about the sample `source` (shard and key) a BadSample.

    Its message has the exception's type, and its cause is the exception. A package that is missing
    (ImportError) and a failing disk or network (OSError with an errno, which Pillow's has not) are
    no fault of the sample: they pass.
    """
    try:
        yield
    except (BadSample, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadSample(source, f"{type(error).__name__}: {error}") from error
