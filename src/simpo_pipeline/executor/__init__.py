"""Steps, identity, plan, live values and the runner that follows the plan."""
