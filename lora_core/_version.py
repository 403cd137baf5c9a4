"""The version of the package, which its root, its build and the command line read here."""

__version__ = "0.1.0"
