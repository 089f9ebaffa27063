"""For tools that cannot read pyproject.toml, which holds everything."""

from setuptools import setup

setup()
