"""Generation: who drafts, how much, and which drafts stand."""
