"""Advice of `gateway advise`: which limits fit a target, by what was measured."""
