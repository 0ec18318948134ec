"""What to run and why: identities, order and the plan. It only reads."""
