"""The models of the GAP paper (arXiv 2506.21873) that transformers does not have: Shikra and MiniGPT-v2.

Each is a vision tower, one linear layer and a Llama, put together from transformers' parts, with a loader that reads the
checkpoint as its authors released it. The decoder is pruned like any decoder alone: ``gap_triton.attach(model.decoder)``;
and by scores of the vision tower, which the model hands it with the images.
"""
