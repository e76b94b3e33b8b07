"""Options of config groups that are read from a folder: model=from:FOLDER, vision@model.vision=...

Hydra asks each of its config sources for an option. This one has those whose name begins with
`from:`: a Hugging Face folder, or a checkpoint or run directory of ours, whose model config is the
option's content. Defaults, overrides and records treat it as any other option.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_method
from omegaconf import OmegaConf

MARK = "from:"
GROUPS = ("model", "language", "vision", "audio")
"""The groups whose options a folder may give."""
_READER = "nvmm.convert.described.described"
"""Loaded by its name when an option is asked for: it needs torch, which a refusal does without."""


class FolderSource(ConfigSource):
    """The options `from:FOLDER`; FOLDER is relative to where the command was started."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of its entry in the search path."""
        return "nvmm-folder"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the model config of the folder that an option names.

        Raises ConfigLoadError, beginning with the override, for a folder that gives none.
        """
        group, name = config_path.split(f"/{MARK}", 1)
        folder = Path(name).expanduser()
        override = f"{group}={MARK}{name}"
        if not folder.is_dir():
            raise ConfigLoadError(f"{override}: {folder} is not a folder")
        read: Any = get_method(_READER)
        try:
            content = read(folder, group)
        except (ValueError, OSError) as error:
            raise ConfigLoadError(f"{override}: {error}") from error
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(content),
            header={"package": None},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether a path is an option `from:FOLDER` of one of the groups."""
        group, mark, _ = config_path.partition(f"/{MARK}")
        return bool(mark) and group in GROUPS

    def is_group(self, config_path: str) -> bool:
        """Return False: the groups are those of the YAMLs."""
        return False

    def available(self) -> bool:
        """Return True."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing: any folder may be an option."""
        return []


class FolderSearchPath(SearchPathPlugin):
    """Puts the source behind the YAMLs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source once."""
        path = f"{FolderSource.scheme()}://"
        if not any(entry.path == path for entry in search_path.get_path()):
            search_path.append(provider="nvmm", path=path)


def register() -> None:
    """Make Hydra ask for folders, however often this is called."""
    for plugin in (FolderSource, FolderSearchPath):
        Plugins.instance().register(plugin)
