"""Inspect what the compiler does: ``explain``, and its report as text, data, page, drawings and repro script.

explaining trace a model and run the passes on copies of its joint graphs
advice     try the advice out before the report gives it
restore    leave the model as it was
programs   the source lines of each block, and its backward pass before and after the rewrite
data       the report as data
summary    the table about the whole model
alike      show chains that differ only in layer or direction as one entry
text       the report for a terminal
page       the report for a browser, with the pictures of ``picture``
measure    step times, and the error of w^k against k
draw       graphs as DOT and SVG
repro      a script that runs without the model
"""

from .data import ExplainedGraph
from .explaining import explain
from .report import Report

__all__ = ["ExplainedGraph", "Report", "explain"]
