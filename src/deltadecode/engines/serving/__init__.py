"""What every serving engine needs, without naming one: settings, rows of a batch, step, counts."""
