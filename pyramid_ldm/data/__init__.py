"""Images, latent shards, and the order in which training sees them."""
