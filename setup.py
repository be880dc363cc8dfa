"""Maps the top-level folder kernels/ to the subpackage fastdiff.kernels; everything else is in pyproject.toml.

A top-level package called `kernels` would overwrite the unrelated PyPI package of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels", "fastdiff.models.digits"],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={
        "fastdiff": ["py.typed"],
        "fastdiff.examples": ["*.sh"],
        "fastdiff.models.digits": ["*.json", "*.safetensors"],
    },
)
