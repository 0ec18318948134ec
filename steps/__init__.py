"""Step functions of the SimPO pipeline."""
