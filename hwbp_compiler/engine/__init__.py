"""How links are evaluated and w is solved for: in graphs, on tensors, and in C++."""
