"""Tables and pictures of what each technique costs and saves, measured on the reader's own machine and model."""
