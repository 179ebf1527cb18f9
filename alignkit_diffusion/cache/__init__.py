"""What the VAE and the text encoders compute, kept on disk for all runs and processes.

    store     tensors by content key, in checked safetensors shards of bounded size, with an index
    table     the usable rows of a data set as columns, so that a million of them open at once
    job       blocks of a data set that processes share by file locks
    keys      hashes of weights, data and options
    images    posteriors of images and embeddings of prompts, from the store or encoded into it
    build     the pass over a data set that fills the store

A latent's key holds the image's content, its placement, the VAE's weights and settings, and the
dtype; an embedding's the prompt and the same of the text encoders and tokenizers. Nothing else, so
other options, other data sets and other runs find what is already there.
"""
