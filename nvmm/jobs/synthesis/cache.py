"""Answers on disk, each in a file whose name is a digest of what was asked.

The digest is of the generator's model and parameters, the messages, the schema, the seed, the
number of the sample and that of the attempt. So an answer that was paid for is never asked for
again, by this pipeline or another one with the same cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvmm.io import files
from nvmm.jobs.synthesis.records import Reply, Request, digest


@dataclass(frozen=True)
class Cache:
    """A folder of replies; `identities` are those of the generators by their names."""

    folder: Path
    identities: Mapping[str, Mapping[str, Any]]

    def material(self, request: Request) -> dict[str, Any]:
        """Return all that the answer to a request depends on."""
        schema = None if request.schema is None else request.schema.model_json_schema()
        return {
            **self.identities[request.generator],
            "messages": request.messages,
            "schema": schema,
            "sample": request.sample,
            "attempt": request.attempt,
        }

    def key(self, request: Request) -> str:
        """Return the name of a request's reply."""
        return digest(self.material(request))

    def get(self, key: str) -> Reply | None:
        """Return a reply; None where there is none, or its file is damaged."""
        try:
            return Reply(**json.loads(self._path(key).read_bytes())["reply"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # A machine that lost its power may leave such a file.

    def put(self, request: Request, reply: Reply) -> None:
        """Keep a reply, with what was asked, in one file that is whole or not there."""
        path = self._path(self.key(request))
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"request": self.material(request), "reply": asdict(reply)}
        with files.publish(path, shared=True, durable=False) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
