"""Version of the package, written into every output."""

__version__ = "0.1.0"
