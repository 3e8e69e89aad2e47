"""hatchling's hook: puts the libraries of tools/build_wheel.py into its wheel; any other build stays as it is."""

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = "JAXSERVE_WHEEL_LIBRARIES"
"""The variable that names their folder."""


class CustomBuildHook(BuildHookInterface):
    """For any Python 3 (they know XLA only), for the platform that they were compiled on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = os.environ.get(LIBRARIES)
        if not folder or version == "editable":
            return
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        for library in Path(folder).glob("*.so"):
            build_data["force_include"][str(library)] = f"jaxserve/native/prebuilt/{library.name}"
