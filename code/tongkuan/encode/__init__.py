"""From items to embeddings: tensors, batches, the cache on disk."""
