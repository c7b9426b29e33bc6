"""New weights from the trainer into the engine that lives in the same processes."""
