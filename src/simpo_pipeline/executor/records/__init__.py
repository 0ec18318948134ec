"""What the executor writes beside a step's outputs, and the lease that allows it to."""
