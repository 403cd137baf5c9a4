"""Fixtures and laws for other projects' tests."""
