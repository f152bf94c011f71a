"""Lets Hydra find our configuration groups, and the host's from any directory.

Hydra imports this at every start, so it stays light. Do not add ``hydra_plugins/__init__.py``: that package is a
namespace shared with other distributions.
"""

from fusion_bench.constants import PROJECT_ROOT_PATH
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

import fusion_bench_didi  # noqa: F401  (applies fusion_bench_didi.compat before the host imports a model pool)


class FusionBenchDiDiSearchPath(SearchPathPlugin):
    """Appends, so a user's own configuration and the host's keep precedence over ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("fusion_bench_didi", "pkg://fusion_bench_didi.config")
        # The host takes a folder named config in the current directory for its own (our repository has one),
        # and then misses its primary configuration.
        for folder in ("fusion_bench_config", "config"):
            if (PROJECT_ROOT_PATH / folder).is_dir():
                search_path.append(
                    "fusion_bench", f"file://{PROJECT_ROOT_PATH / folder}"
                )
                return
