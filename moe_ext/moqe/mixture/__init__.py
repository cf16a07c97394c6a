"""The mixture of quantised experts: its router, its model, its folder."""
