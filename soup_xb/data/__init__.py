"""From a config's data to rows of tokens: sources, tokenizers, chat templates, media, and the rows that are kept."""
