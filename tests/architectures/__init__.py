"""Real architectures, each written natively in PyTorch and in Keras as its users write it.

Names and structure follow torchvision and transformers on the one side, Keras Applications on the other.
"""
