"""Suites that other classes of a framework can be held to as well."""
