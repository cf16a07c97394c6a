"""Text: documents by name, conversations, packing into blocks, batches."""
