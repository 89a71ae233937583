"""What models read and generate: corpora, prompt files, self-generated text."""
