"""The backend of GPUs: Transformer Engine's linears, norms, attention and grouped experts, through
Megatron-Core's own layer specs. Router, rotary positions, embedding and output layer are ``torch_native``'s.
"""
