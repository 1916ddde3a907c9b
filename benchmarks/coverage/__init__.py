"""How much of real models the compiler finds: ``python -m benchmarks.coverage run`` and ``report``."""
