"""Responses as reward functions read them."""

from __future__ import annotations


def boxed(answer: object) -> str:
    r"""A response's answer: \boxed{answer}."""
    return r"\boxed{" + str(answer) + "}"
