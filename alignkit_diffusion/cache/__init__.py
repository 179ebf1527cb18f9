"""What the VAE and the text encoders compute, kept on disk for all runs and processes.

    store     tensors by content key: `shard` is one file of them, `index` says where each is
    arrays    arrays as one checked file
    writing   files that are whole or not there, and what is said when the disk is full
    job       blocks of a data set that processes share by file locks
    keys      hashes of weights, data and options; `facts` puts them together
    build     the pass over a data set that fills the stores, and the check that they are full

A latent's key holds the image's content, its placement, the VAE's weights and settings, and the
dtype; an embedding's the prompt and the same of the text encoders and tokenizers. Nothing else, so
other options, other data sets and other runs find what is already there.
"""
