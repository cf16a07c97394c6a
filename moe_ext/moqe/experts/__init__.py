"""The frozen experts: how they are stored, quantised, told apart and run."""
