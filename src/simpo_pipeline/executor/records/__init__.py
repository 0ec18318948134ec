"""Records that the executor writes next to a step's outputs, and the lease that protects them."""
