"""For evaluate `steps` is a key, the former name of `num_steps`; for the other commands it is a group.

Hydra takes `steps=[1,2]` for choices of a group wherever conf/steps/ is found, whatever the command's defaults list. So
evaluate is shown conf/ without that group, by two of Hydra's documented kinds of plugin: a search-path plugin, and a
source of configurations.
"""

import contextlib
from collections.abc import Iterator

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class WithoutSteps(FileConfigSource):
    """A directory of configurations, but for its group `steps`."""

    @staticmethod
    def scheme() -> str:
        return "pdistill-without-steps"

    def is_group(self, config_path: str) -> bool:
        return config_path != "steps" and super().is_group(config_path)


class HideSteps(SearchPathPlugin):
    """Puts `WithoutSteps` into the place of the program's own directory, while `active`."""

    active = False

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            if self.active and element.provider == "main":
                element.path = f"{WithoutSteps.scheme()}://{element.path}"


@contextlib.contextmanager
def steps_is_a_key() -> Iterator[None]:
    """What Hydra composes within sees no group `steps`."""
    for plugin in (WithoutSteps, HideSteps):
        Plugins.instance().register(plugin)
    HideSteps.active = True
    try:
        yield
    finally:
        HideSteps.active = False
