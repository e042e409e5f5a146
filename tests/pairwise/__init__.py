"""Two or more updates of one base: real checkpoints and adapter folders made small, with planted answers."""
