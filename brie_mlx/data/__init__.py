"""From a person's logs to examples that can be trained on."""
