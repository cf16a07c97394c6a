"""Text: documents by name, packing into blocks, batches."""
