"""A small trainer that makes the models to compare: one readable loop, data, and the command."""
