"""Whether a rewrite is expected to pay: device figures, estimates, and the common sequence of decisions."""
