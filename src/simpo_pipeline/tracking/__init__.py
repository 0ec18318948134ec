"""Where metrics go besides the step outputs."""
