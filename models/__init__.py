"""Model families, their weight tables and how they are built on Megatron-Core."""
