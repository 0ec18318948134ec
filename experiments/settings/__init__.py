"""The settings files of experiments: knobs under their known names, and what they mean to the steps."""
