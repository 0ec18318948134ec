"""Planning of what to run and why: step identities, execution order and the plan. Only reads storage."""
