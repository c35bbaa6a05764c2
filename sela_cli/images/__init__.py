"""Images: where they come from (`sources`), batches of them (`batches`), `augment`."""
