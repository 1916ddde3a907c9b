"""Whether a rewrite is expected to pay: figures of devices, estimates, and the one ladder of decisions."""
