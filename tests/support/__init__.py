"""What the tests of every op share: problems drawn from a seed, oracles, and the tolerance rule."""
