"""A router over frozen, quantised versions of one model; see docs/moqe.md."""
