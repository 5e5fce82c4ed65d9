"""The networks: the flow transformer, the codec, the text encoder, and the generator that joins them."""
