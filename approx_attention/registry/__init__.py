"""The registry of methods with their capabilities, and methods bound to hyper-parameters."""

from approx_attention.registry.bound import BoundMethod, bind
from approx_attention.registry.heads import HeadMethods
from approx_attention.registry.method import CAPABILITY_OF, OPTIONS, Capabilities, Method, accepted, arguments
from approx_attention.registry.table import METHODS, get_method

__all__ = [
    "CAPABILITY_OF",
    "METHODS",
    "OPTIONS",
    "BoundMethod",
    "Capabilities",
    "HeadMethods",
    "Method",
    "accepted",
    "arguments",
    "bind",
    "get_method",
]
