"""Where sound and text come from: the embedded world (events, scenes), folders of recordings, prompt sets,
and spoken utterances (speech)."""
