"""A plug-in for vLLM: images are pruned before the decoder, and each survivor keeps its own position id.

It patches nothing of vLLM that runs on a GPU. `register` is what vLLM calls. `options` and `plan` say how many tokens of an
image stay, `processor` makes the placeholders fewer, `model` scores and chooses when the image is encoded, and `positions`
has the ids. What a family has of its own is in `layouts`, without vLLM, and in `llava`, `llava_next` and `qwen`.
"""
