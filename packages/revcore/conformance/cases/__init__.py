"""The cases, by theme."""

# In the order of the table.
from conformance.cases import gradients, uses, modules, tensors  # noqa: I001, F401
from conformance.cases import state, torch_features, memory, distributed  # noqa: F401
from conformance.questions import QUESTIONS

__all__ = ["QUESTIONS"]
