"""The cases, by theme."""

from conformance.cases import gradients, uses, tensors, state, torch_features, memory, distributed  # noqa: I001, F401 - the order of the table
from conformance.questions import QUESTIONS

__all__ = ["QUESTIONS"]
