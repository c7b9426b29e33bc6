"""The class of quantised parameters, which Megatron asks every parameter for. None is one here."""


class QuantizedTensor:
    """No tensor is an instance of it."""
