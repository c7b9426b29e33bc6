"""The backend that runs everywhere: plain torch modules where Megatron-Core's own need CUDA or Transformer
Engine. Megatron-Core's own linear layers, embeddings, router and dispatcher are used as they are.
"""
