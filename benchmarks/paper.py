"""The paper's Table 6, for reference: a whole training step of recurrent networks on a GPU."""

from __future__ import annotations

ITERATIONS = (0, 1, 2, 3, 5, 10, 20)

# layers and length -> backprop, then Highway-BP and fixed-point iteration at every k of ITERATIONS; milliseconds
STEP_MS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "LSTM, 256 steps": (261, (87, 101, 114, 125, 154, 218, 347), (81, 92, 99, 111, 128, 173, 262)),
    "GRU, 256 steps": (209, (66, 77, 88, 97, 118, 166, 266), (62, 69, 73, 79, 92, 119, 176)),
    "GRU of 3 layers, 256 steps": (687, (240, 268, 300, 332, 389, 538, 839), (226, 243, 260, 281, 316, 400, 573)),
    "GRU, 1024 steps": (715, (205, 210, 210, 210, 230, 248, 292), (191, 207, 204, 203, 209, 216, 241)),
}

# The same cases in the form of the recurrent suite: kind, layers, steps.
CASES = {
    "LSTM, 256 steps": ("LSTM", 1, 256),
    "GRU, 256 steps": ("GRU", 1, 256),
    "GRU of 3 layers, 256 steps": ("GRU", 3, 256),
    "GRU, 1024 steps": ("GRU", 1, 1024),
}
