"""What is made of the collected routing: measures, interventions, comparisons of checkpoints."""
