"""Inspect what the compiler does: ``explain`` and its report as text, data, page, drawings and repro script.

explaining trace a model and run the passes on copies of its joint graphs
advice     try out the advice before it is given
restore    leave the model as it was
programs   blocks as their forward source and their backward program, before and after
data       the report
summary    what the model gets as a whole
alike      chains that differ only in layer or direction, as one entry
text       for a terminal
page       for a browser, with the pictures of ``picture``
measure    step times; the error of w^k against k
draw       graphs as DOT and SVG
repro      a script that stands alone
"""

from .data import ExplainedGraph
from .explaining import explain
from .report import Report

__all__ = ["ExplainedGraph", "Report", "explain"]
