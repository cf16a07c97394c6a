"""The training of heads and router: data, stages 1 and 2, and PPO."""
