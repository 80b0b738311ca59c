"""The version of the package, which cards of exports record."""

VERSION = "0.1.0"
