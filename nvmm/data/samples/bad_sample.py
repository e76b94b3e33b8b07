"""A sample that cannot be trained on."""

from __future__ import annotations


class BadSample(ValueError):  # noqa: N818  # the sample is bad, not the program
    """One broken sample, which the loader skips, counts and logs once (or stops at).

    Builders and decoders raise it, or a plain ValueError, for damaged or unusable members. A read
    that may work at the next attempt (OSError: a lost connection, a missing file) is no bad sample.

    source: shard and key, `shard:key`. reason: the fault, for the message.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.source, self.reason)
